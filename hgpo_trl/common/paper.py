"""The paper that this library implements."""

import textwrap

TITLE = "Think Only When You Need with Large Hybrid-Reasoning Models"
ARXIV_ID = "2505.14631"
CITATION = textwrap.dedent("""\
    @article{jiang2025think,
        title                = {{Think Only When You Need with Large Hybrid-Reasoning Models}},
        author               = {Lingjie Jiang and others},
        year                 = 2025,
        eprint               = {arXiv:2505.14631},
    }""")
