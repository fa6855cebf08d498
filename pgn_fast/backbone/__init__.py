"""A frozen timm vision transformer: loading it, and running it with prompts.

``schedule`` says which prompts enter where, ``reference`` runs them by timm's own blocks.
"""
