"""What this project uses of its dependencies without their promise: all of it, by library, as it was when written.

A test of one of these that fails says that a new release has changed what the named module relies on: look there first,
then mend the row here. Whatever private is used and has no row fails as well.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Private(NamedTuple):
    """A private name, who relies on it, and of a function the parameters that it is called with or overridden by."""

    name: str
    used_in: str
    parameters: tuple[str, ...] | None = None


TORCH = [
    Private("torch._C._functorch.get_interpreter_stack", "ebft_kernels/_transforms.py"),
    Private("torch._C._functorch.get_unwrapped", "ebft_kernels/_transforms.py"),
    Private("torch._C._functorch.is_functorch_wrapped_tensor", "ebft_kernels/_transforms.py"),
    Private("torch._C._functorch.is_gradtrackingtensor", "ebft_kernels/_transforms.py"),
    Private("torch._C._functorch.peek_interpreter_stack", "ebft_kernels/_transforms.py"),
    Private("torch.autograd.forward_ad._current_level", "ebft_kernels/_transforms.py"),
    Private("torch._assert_async", "ebft_kernels/logprob/_tiled.py"),
    Private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "ebft_kernels/attention/_torch.py"),
    Private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", "ebft_kernels/attention/_torch.py"),
    Private("torch.utils._python_dispatch.TorchDispatchMode", "python/ebft_trainer/decoding_graphs.py"),
    Private("torch.utils._python_dispatch.TorchDispatchMode", "python/ebft_trainer/dry_run.py"),
    Private("torch.utils._pytree.tree_leaves", "python/ebft_trainer/decoding_graphs.py"),
    Private("torch.utils._pytree.tree_leaves", "python/ebft_trainer/dry_run.py"),
]
_TRAINER = "transformers.Trainer."
TRANSFORMERS = [
    Private("transformers.PreTrainedConfig._attn_implementation", "ebft_kernels/integrations/_strided_attention.py"),
    Private("transformers.PreTrainedConfig._attn_implementation", "ebft_kernels/integrations/_models.py"),
    Private(_TRAINER + "_get_output_dir", "python/ebft_trainer/recovery.py", ("trial",)),
    Private(_TRAINER + "_save_checkpoint", "python/ebft_trainer/recovery.py", ("model", "trial")),
    Private(_TRAINER + "_load_from_checkpoint", "python/ebft_trainer/recovery.py", ("resume_from_checkpoint", "model")),
    Private(_TRAINER + "_load_best_model", "python/ebft_trainer/recovery.py", ()),
    Private(_TRAINER + "_load_optimizer_and_scheduler", "python/ebft_trainer/recovery.py", ("checkpoint",)),
    Private(_TRAINER + "_load_scaler", "python/ebft_trainer/recovery.py", ("checkpoint",)),
    Private(_TRAINER + "_load_rng_state", "python/ebft_trainer/recovery.py", ("checkpoint",)),
    # Not private by name, but documented nowhere.
    Private(
        _TRAINER + "get_batch_samples",
        "python/ebft_trainer/trainer.py",
        ("epoch_iterator", "num_batches", "device"),
    ),
    Private(
        _TRAINER + "compute_loss",
        "python/ebft_trainer/trainer.py",
        ("model", "inputs", "return_outputs", "num_items_in_batch"),
    ),
    Private("transformers.utils.chat_template_utils.render_jinja_template", "python/ebft_trainer/chat.py"),
    Private(_TRAINER + "save_model", "python/ebft_trainer/trainer.py", ("output_dir", "_internal_call")),
    Private(
        _TRAINER + "create_model_card",
        "python/ebft_trainer/trainer.py",
        tuple("language license tags model_name finetuned_from tasks dataset_tags dataset dataset_args".split()),
    ),
]
# Documented nowhere either; only where trl is, which needs Python 3.11.
TRL = [Private("trl.trainer.utils.FusedCausalLMOutput", "ebft_kernels/integrations/trl.py")]
ALL = TORCH + TRANSFORMERS + (TRL if importlib.util.find_spec("trl") else [])
#: Attributes of instances, which cannot be looked up in a class: who relies on them has tests that run them.
OF_INSTANCES = {
    "_attn_implementation_internal": "ebft_kernels/integrations/_strided_attention.py",  # of a config
    "_models": "python/ebft_trainer/trainer.py",  # of an Accelerator
    "_original_forward": "ebft_kernels/integrations/trl.py",  # of a model that accelerate has wrapped
}
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl")


def found(name: str) -> object:
    """The object of a dotted name, or an AttributeError that says what is missing."""
    parts = name.split(".")
    value: object = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            try:
                importlib.import_module(".".join(parts[:i]))
            except ImportError:
                raise AttributeError(f"{'.'.join(parts[:i])} is gone") from None
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("private", ALL, ids=lambda x: x.name)
def test_it_is_there_as_it_was(private):
    assert private.name.rpartition(".")[2] in (ROOT / private.used_in).read_text(encoding="utf-8"), "no longer used"
    try:
        value = found(private.name)
    except AttributeError as error:
        pytest.fail(f"{error}: {private.used_in} relies on it")
    if private.parameters is not None:
        parameters = [x for x in inspect.signature(value).parameters if x != "self"]
        message = f"{private.used_in} overrides {private.name} with these parameters, the library now has {parameters}"
        assert tuple(parameters) == private.parameters, message


def used(path: Path) -> set[str]:
    """Private names of the libraries in a file: attributes, imports, and what is called on ``super()``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in LIBRARIES:
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            inner = text.removeprefix("super().")
            of_library = text.split(".")[0] in LIBRARIES or inner != text or text in ("forward_ad._current_level",)
            of_object = node.attr in OF_INSTANCES or node.attr.startswith("_attn_implementation")
            dotted = [inner] if (of_library and re.fullmatch(r"[\w.]+", inner)) or of_object else []
        else:
            continue
        for name in dotted:
            names |= {part for part in name.split(".") if part.startswith("_") and not part.endswith("__")}
    return names


def test_nothing_private_is_used_that_has_no_row():
    rows = [(part, private.used_in) for private in ALL for part in private.name.split(".") if part.startswith("_")]
    allowed = {*rows, *OF_INSTANCES.items()}
    files = [path for folder in ("ebft_kernels", "python") for path in (ROOT / folder).rglob("*.py")]
    uses = {(name, path.relative_to(ROOT).as_posix()) for path in files for name in used(path)}
    assert uses >= {
        ("_functorch", "ebft_kernels/_transforms.py"),
        ("_save_checkpoint", "python/ebft_trainer/recovery.py"),
    }
    assert uses <= allowed, sorted(uses - allowed)


def test_what_is_gone_is_named(tmp_path):
    with pytest.raises(AttributeError, match=r"torch\._never is gone"):
        found("torch._never.was")
    path = tmp_path / "uses.py"
    path.write_text("from torch._new import thing\nimport torch\n\ntorch._other.x\nsuper()._third()\nself._own\n")
    assert used(path) == {"_new", "_other", "_third"}
