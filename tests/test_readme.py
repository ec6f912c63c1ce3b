"""The commands that the READMEs show are accepted: scripts, subcommands and flags exist."""

import re
import shlex

import pytest

import evaluate
import prepare_data
import train
from tests.conftest import ROOT

PARSERS = {
    "train.py": lambda argv: train.build_parser().parse_args(argv),
    "evaluate.py": evaluate.parse_arguments,
    "prepare_data.py": prepare_data.parse_arguments,
}


def commands(path) -> list[list[str]]:
    """The commands in the bash blocks of a README, as words from the script's name on."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace("$method", "redi"), comments=True)
            script = next((i for i, word in enumerate(words) if word in PARSERS), None)
            if script is not None and words[script + 1 :]:  # train.py alone is the example
                found.append(words[script:])
    return found


@pytest.mark.parametrize("readme", ["README.md", "redi/README.md"])
def test_commands_parse(readme):
    found = commands(ROOT / readme)
    assert len(found) > 5
    for script, *argv in found:
        PARSERS[script](argv)
