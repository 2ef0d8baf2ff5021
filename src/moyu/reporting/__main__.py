"""`python -m moyu.reporting`: write the committed scoreboard's tables and plot into docs, and a part of them into README.md."""

import re
from pathlib import Path

from moyu import records
from moyu.reporting import scoreboard

rows = records.read(Path("docs/results/trinity.jsonl"))
block = r"(<!-- scoreboard: [^\n]*-->\n).*?(<!-- /scoreboard -->)"
for page, text in (
    (Path("docs/scoreboard.md"), scoreboard.markdown(rows)),
    (Path("README.md"), scoreboard.brief(rows)),
):
    page.write_text(re.sub(block, lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page.read_text(), flags=re.DOTALL))
Path("docs/results/trinity.svg").write_text(scoreboard.plot([r for r in rows if isinstance(r, records.Cell)]) + "\n")
