"""Words that the project does not use: spelling is American, terms are the field's.

The whole text of pages and sources is read, so names, messages and comments count too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pgn_fast", "kernels", "csrc", "docs", "bench", "tools", "examples", "tests", ".github")
SUFFIXES = {".py", ".md", ".cpp", ".h", ".inc", ".cu", ".cuh", ".yml", ".ipynb"}
FILES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in SUFFIXES and path != Path(__file__)
]
FILES += [*ROOT.glob("*.md"), ROOT / "CITATION.cff", ROOT / "pyproject.toml", ROOT / "Makefile"]

VERBS = """
capital categor crystall custom emphas equal factor final general initial material maxim memor minim
normal optim organ parallel penal prior quant random real recogn regular serial special standard
summar synchron token util vector visual
"""
BRITISH = """
colour behaviour favour neighbour honour flavour rigour grey centre licence analyse catalogue
artefact whilst labelled labelling modelled modelling signalled signalling learnt spelt judgement
defence ageing
"""
AFTER = """
the patches|the prefix|the first|the last|its last|the norm|a norm|a block|block|the token assembly|
the checkpoint|its checkpoint|the output projection|them
"""
# what it is, and the words; from the beginning of a word, in any case
WORDS = {
    "British spelling": rf"({'|'.join(VERBS.split())})is(e|ed|er|es|ing|ation|able)"
    rf"|{'|'.join(BRITISH.split())}",
    '"behind" where "after" is meant': "behind (" + AFTER.replace("\n", "") + r")\b",
    "no term of the field": r"(house|room|roads?) of\b|(both|plain|fast|whole) roads?"
    r"|plain (py)?torch|matrix products?|columns dense"
    r"|(dispatch|support|packed|cache)\.refusal|(?!test_)\w+_refusal\b",
    "no idiom of English": "anew|brings along|brought along|not to be had|walks? along|hoped-for",
    "not about the software": r"claude|anthropic|chatgpt|subagent|worktree|issue #?\d{1,2}\b",
}


@pytest.mark.parametrize("what", WORDS)
def test_spelling(what):
    pattern = re.compile(rf"\b({WORDS[what]})", re.I)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for match in [pattern.search(line)]
        if match
    ]
    assert not found, "\n".join([what, *found])
