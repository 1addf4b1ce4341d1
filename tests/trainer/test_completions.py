"""What the model writes at an evaluation: what is chosen and measured, and where it is shown, hostile text included."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from ebft_kernels import StridedLayout, feature_matching
from ebft_trainer import EBFTConfig, EBFTOptions, EBFTTrainer
from ebft_trainer import completions as module
from ebft_trainer.completions import (
    COMPLETIONS_FILE,
    KEPT,
    Anchor,
    Completions,
    CompletionsFile,
    ends,
    print_table,
    printable,
    read_completions,
    send,
)
from ebft_trainer.config import device_arguments
from ebft_trainer.report import read_runs, report_page

from .test_report import Page, write_run

HOSTILE = '<script>alert("x")</script> [red]\x1b[2J\u202e\r\n| ```'


def anchor(alignment: float, text: str = "ab") -> Anchor:
    return Anchor("the prefix", "cd", [text, text], [alignment, alignment], [1.0, -1.0], [False, True])


@pytest.fixture
def batch():
    """Two rows, 12 anchors each; alignments that grow with the number of the anchor."""
    layout = StridedLayout.strided(2, 30, context=4, stride=2, horizon=3, samples=2)
    prompt = torch.arange(60).view(2, 30) + 60
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(60, 120, (2, layout.num_anchors, 2, 3), generator=generator)
    tokens[0, 0, 1] = tokens[0, 0, 0]
    features = torch.randn(2, layout.num_anchors, 2, 5, generator=generator)
    match = feature_matching(features, torch.randn(2, layout.num_anchors, 5, generator=generator))
    order = torch.arange(2.0 * layout.num_anchors).view(2, -1, 1).expand(-1, -1, 2)
    return SimpleNamespace(layout=layout, prompt=prompt, tokens=tokens, match=match._replace(alignment=order))


def test_the_worst_and_the_best_are_kept(batch, byte_tokenizer):
    options = EBFTOptions(alignment_coef=0.5, diversity_coef=2.0)
    shown = Completions(byte_tokenizer, options)
    for _ in range(2):
        shown.add(batch.prompt, batch.tokens, batch.layout, batch.match, {})
    found = shown.anchors()
    assert len(found) == 2 * KEPT and [x.alignment for x in found] == sorted(x.alignment for x in found)
    last = 2 * batch.layout.num_anchors - 1
    assert found[0].alignment == found[1].alignment == 0 and found[-1].alignment == found[-2].alignment == last
    first = found[0]
    text = byte_tokenizer.decode(batch.prompt[0])
    assert first.prefix == text[:4] and first.target == text[4:7] and first.duplicates == [False, True]
    assert first.completions == [byte_tokenizer.decode(batch.tokens[0, 0, 0])] * 2
    expected = 0.5 * batch.match.alignment[0, 0] - 2.0 * batch.match.diversity[0, 0]
    assert first.rewards == pytest.approx(expected.tolist())


def test_anchors_that_are_not_valid_are_not_shown(batch, byte_tokenizer):
    layout = StridedLayout.strided(2, 30, context=4, stride=2, horizon=3, samples=2, lengths=torch.tensor([9, 12]))
    shown = Completions(byte_tokenizer, EBFTOptions())
    shown.add(batch.prompt, batch.tokens, layout, batch.match, {})
    assert len(shown.anchors()) == layout.num_valid == 5


def test_ends_share_no_anchor():
    anchors = [anchor(float(i)) for i in range(5)]
    worst, best = ends(anchors).values()
    assert [x.alignment for x in worst] == [0, 1, 2] and [x.alignment for x in best] == [4, 3]
    assert ends([])["best matches"] == []


@pytest.mark.parametrize("rich", (True, False))
def test_the_terminal(monkeypatch, capsys, rich):
    if rich:
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "160")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    print_table([anchor(-0.5, HOSTILE), anchor(1.25)], "step 3, eval")
    out = capsys.readouterr().out
    for words in (
        "step 3, eval: worst matches",
        "best matches",
        "the prefix",
        "real text",
        "-0.500",
        "1.250",
        "duplicate",
    ):
        assert words in out, words
    assert "\\x1b[2J" in out and "[red]" in out and not {"\x1b", "\u202e", "\r"} & set(out)


def test_a_terminal_without_the_characters(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal)
        print_table([anchor(1.0, "\u00e9\ud800")], "x")
    terminal.flush()
    assert b"\\xe9" in terminal.buffer.getvalue()
    assert printable("a\u00e9\n\x07") == "a\u00e9\\n\\x07"


def test_what_reports_are_sent(monkeypatch):
    logged, texts = [], []
    wandb = SimpleNamespace(run=object(), Table=lambda **table: table, log=logged.append)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    writer = SimpleNamespace(add_text=lambda *text: texts.append(text))
    callbacks = [object(), SimpleNamespace(tb_writer=None), SimpleNamespace(tb_writer=writer)]
    anchors = [anchor(0.0, HOSTILE), anchor(1.0)]
    send(anchors, "eval/completions", 7, report_to=["wandb", "tensorboard"], callbacks=callbacks)
    (entry,) = logged
    assert entry["train/global_step"] == 7
    table = entry["eval/completions"]
    assert len(table["data"]) == 6 and all(len(row) == len(table["columns"]) for row in table["data"])
    ((name, text, step),) = texts
    assert (name, step) == ("eval/completions", 7) and "<" not in text and "&lt;script&gt;" in text
    assert len(text.splitlines()) == 6 and all(line.startswith("    ") for line in text.splitlines())
    wandb.run = None
    send(anchors, "eval/completions", 8, report_to=["wandb"], callbacks=[])
    send(anchors, "eval/completions", 8, report_to=[], callbacks=callbacks)
    assert len(logged) == len(texts) == 1


def test_the_file(tmp_path):
    """What a resumed run had written after the step that it goes on from is cut off; a new run begins anew."""
    file = CompletionsFile(tmp_path)
    file.write([anchor(float("nan"))], "eval", 0)
    file.write([anchor(1.0, HOSTILE)], "eval", 10)
    file.write([anchor(2.0)], "eval", 20)
    assert read_completions(tmp_path)["eval"] == (20, [anchor(2.0)])
    with file.path.open("a") as lines:
        lines.write('{"half')
    assert read_completions(tmp_path)["eval"][0] == 20
    resumed = CompletionsFile(tmp_path)
    resumed.write([anchor(3.0)], "eval_b", 20)
    found = read_completions(tmp_path)
    assert found["eval"] == (10, [anchor(1.0, HOSTILE)]) and found["eval_b"] == (20, [anchor(3.0)])
    CompletionsFile(tmp_path).write([anchor(4.0)], "eval", 0)
    assert read_completions(tmp_path) == {"eval": (0, [anchor(4.0)])}
    assert read_completions(tmp_path / "nothing") == {}


@pytest.mark.parametrize(
    "line",
    (
        "[]",
        "{}",
        '{"step": 1, "name": "eval", "anchors": [{"prefix": "a"}]}',
        '{"step": "1", "name": "eval", "anchors": []}',
        '{"step": 1, "name": "eval", "anchors": 3}',
        json.dumps({"step": 1, "name": "e", "anchors": [vars(anchor(1.0)) | {"alignments": ["<b>", 1.0]}]}),
        json.dumps({"step": 1, "name": "e", "anchors": [vars(anchor(1.0)) | {"completions": []}]}),
        json.dumps({"step": 1, "name": "e", "anchors": [vars(anchor(1.0)) | {"prefix": None}]}),
    ),
)
def test_a_broken_file_is_named(tmp_path, line):
    (tmp_path / COMPLETIONS_FILE).write_text(line + "\n")
    with pytest.raises(ValueError, match=rf"{COMPLETIONS_FILE}: line 1: expected step, name and anchors"):
        read_completions(tmp_path)


def test_the_report(tmp_path):
    """Worst first, and whatever a model writes is text."""
    folder = write_run(tmp_path / "a", 1e-3)
    CompletionsFile(folder).write([anchor(-0.5, HOSTILE), anchor(0.5), anchor(1.25)], "eval", 60)
    text = str(report_page(read_runs([folder])))
    page = Page(text)
    assert "What the model writes: a, eval, step 60" in page.words and "duplicate" in page.words
    assert page.words.index("worst matches") < page.words.index("-0.500") < page.words.index("best matches")
    assert "1.250" in page.words and HOSTILE.split(" ")[0] in page.words
    assert "script" not in page.tags and not page.links and "<script>alert" not in text


@pytest.fixture
def trainer(plain, byte_tokenizer, tmp_path):
    def make(**options) -> EBFTTrainer:
        rows = [
            {"input_ids": torch.randint(30, 120, (20,), generator=torch.Generator().manual_seed(i))} for i in range(4)
        ]
        shape = {"context": 4, "stride": 4, "horizon": 3, "samples": 2}
        given = {"processing_class": byte_tokenizer} | {
            k: options.pop(k) for k in ("processing_class",) if k in options
        }
        config = EBFTConfig(
            str(tmp_path / "run"), report_to="none", max_steps=1, **shape, **device_arguments(), **options
        )
        model = plain.build(vocab_size=len(byte_tokenizer))
        return EBFTTrainer(model, config, train_dataset=rows, eval_dataset=rows, **given)

    return make


def test_an_evaluation_shows_them(trainer, capsys, tmp_path):
    run = trainer(log_completions=True)
    metrics = run.evaluate()
    assert "worst matches" in capsys.readouterr().out
    step, anchors = read_completions(tmp_path / "run")["eval"]
    assert step == 0 and len(anchors) == 16 and all(len(x.completions) == 2 for x in anchors)
    plain = trainer().evaluate()
    assert {k: v for k, v in plain.items() if "second" not in k and "runtime" not in k}.items() <= metrics.items()
    # With so few anchors that all are kept, their mean is what is logged.
    assert sum(x.alignment for x in anchors) / 16 == pytest.approx(metrics["eval_alignment"], rel=1e-4)
    assert "worst matches" not in capsys.readouterr().out and module.KEPT == 8


def test_a_tokenizer_is_needed(trainer):
    with pytest.raises(ValueError, match="processing_class: expected the tokenizer that log_completions decodes with"):
        trainer(log_completions=True, processing_class=None)
