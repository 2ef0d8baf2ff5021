"""`python -m moyu.methods`: write the generated method table into README.md."""

import re
from pathlib import Path

from moyu import methods

readme = Path("README.md")
text = readme.read_text()
block = r"(<!-- methods: [^\n]*-->\n).*?(<!-- /methods -->)"
readme.write_text(re.sub(block, lambda m: f"{m[1]}{methods.markdown()}\n{m[2]}", text, flags=re.DOTALL))
