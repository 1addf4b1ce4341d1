"""What a run prints: nothing of packages that it does not use, no progress bar into a file."""

from __future__ import annotations

import importlib
import subprocess
import sys


def test_the_command_prints_its_own_lines_only(model_folder, tmp_path):
    """Into files, as on a cluster; with every optional package that there is installed beside."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(40)), encoding="utf-8")
    options = "--length 48 --context 4 --stride 6 --horizon 3 --samples 2 --eval-rows 4 --max-steps 4 --logging-steps 2"
    arguments = ["train", "--model", model_folder, "--data", text, "--output", tmp_path / "run", *options.split()]
    main = "from ebft_trainer.cli import main; main()"
    command = [sys.executable, "-c", main, *map(str, arguments), "--eval-fraction", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\r" not in done.stdout + done.stderr and "%|" not in done.stdout + done.stderr
    # transformers says what training changes in the model's configs.
    errors = [line for line in done.stderr.splitlines() if not line.startswith("[transformers] The tokenizer has new")]
    assert errors and all(line.startswith("ebft-train: ") for line in errors), done.stderr
    assert "ebft-train: rollouts end with the tokens [256]" in errors
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    # Evaluation before and after, two log lines, the last line of transformers.
    assert len(lines) == 5 and sum("'loss/rl'" in line for line in lines) == 2
    assert not [line for line in done.stdout.splitlines() if "accelerator" in line or "WARNING" in line]


def test_only_warnings_at_an_import_are_kept_back(tmp_path, monkeypatch, caplog):
    lines = 'import logging\nlogger = logging.getLogger("DeepSpeed")\n'
    lines += 'logger.warning("what it found")\nlogger.error("what is broken")\n'
    (tmp_path / "deepspeed.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    importlib.import_module("ebft_trainer")
    importlib.import_module("deepspeed").logger.warning("later")
    del sys.modules["deepspeed"]
    assert caplog.messages == ["what is broken", "later"]
