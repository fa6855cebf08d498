"""The official code's numbers: fixtures, and its tensor names in timm's. Test code only."""
