"""`python -m moyu.methods`: write the generated method table into README.md, and the heads of the pages in docs/methods."""

import re
from pathlib import Path

from moyu import methods
from moyu.methods import pages

readme = Path("README.md")
text = readme.read_text()
block = r"(<!-- methods: [^\n]*-->\n).*?(<!-- /methods -->)"
readme.write_text(re.sub(block, lambda m: f"{m[1]}{methods.markdown()}\n{m[2]}", text, flags=re.DOTALL))
Path("docs/methods").mkdir(exist_ok=True)
pages.write(Path("docs/methods"))
