"""What a contributor's commit is checked by is what continuous integration checks first."""

import yaml

from tests.support.torchrun import ROOT


def test_the_hooks_of_a_commit_are_the_checks_of_the_tests_script():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lines = (ROOT / "launch" / "test.sh").read_text().splitlines()
    of_code = [hook for hook in hooks if "stages" not in hook]  # the others look at its message
    assert len(of_code) == 3
    for hook in of_code:
        assert any(line.startswith(hook["entry"]) for line in lines), f"{hook['entry']} is not in launch/test.sh"
