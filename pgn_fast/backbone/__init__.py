"""A frozen timm vision transformer, run with prompts. In the order in which a forward meets them:

``load``, ``twins/`` and ``families/``: which backbones there are, and what their classes look like;
``schedule`` and ``readout``: which prompts enter where, and which tokens are read at the end;
``eager``: timm's own blocks, with ``written`` for what their forwards do not take;
``engine``: the same faster, by ``embedding`` (images to tokens), ``steps`` (what each block has to
do), ``blocks``, ``splitting``, ``entering`` and ``recompute`` (how it does it), with ``weights``
that ``fold``, ``packed`` and ``quantized`` prepare, ``cache`` keeps and ``watch`` renews;
``support`` and ``explain``: what the engine runs, and what it saves.
"""
