"""The packed row of strided block-parallel rollouts: the one owner of all index arithmetic.

A packed row holds a prompt once and, behind it, every rollout of every anchor, ordered (anchor, sample, step):

    [ x_0 .. x_{P-1} | rollout tokens (0,0,0) .. (0,0,G-1), (0,1,0) .. (A-1,n-1,G-1) ]        S = P + A*n*G

Shape alphabet: B batch, P prompt length, A anchors, n samples, G horizon, S packed length.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import _layout_native, _native, _triton
from ._checks import INT_LIMIT, INTEGER, check_int, check_option, check_tensor
from ._transforms import transforming


class KeyRanges(NamedTuple):
    """What each packed row may attend to: keys ``[prefix_start, prefix_end)`` and ``[own_start, row]``.

    Each [B, S] int32. The first range lies in the prompt; the second in the row's own rollout, and is empty
    (``own_start = row + 1``) for prompt rows.
    """

    prefix_start: Tensor
    prefix_end: Tensor
    own_start: Tensor


_TENSORS = ("anchors", "valid", "lengths", "prompt_start", "position_ids")


class StridedLayout:
    """Where every token of a batch of packed rows stands, what it sees and which row predicts it. Immutable.

    Prompt token ``i`` sees the prompt tokens of its document up to itself. Rollout token ``(b, j, g)`` (anchor,
    sample, step) sees the prompt tokens of its document before the anchor, ``x[0 .. a_b)``, and the tokens
    ``(b, j, 0..g)`` of its own rollout. Nothing sees another rollout. The packed forward is therefore equal to
    ``A * n`` plain causal forwards over ``x[0 .. a_b) + rollout``.

    >>> layout = StridedLayout.strided(1, 6, context=2, stride=2, horizon=2, samples=2)
    >>> print(layout.draw())                        # '#': the row's token sees the column's token
    prompt 0       #.............
    prompt 1       ##............
    prompt 2       ###...........
    prompt 3       ####..........
    prompt 4       #####.........
    prompt 5       ######........
    a=2 j=0 g=0    ##....#.......
    a=2 j=0 g=1    ##....##......
    a=2 j=1 g=0    ##......#.....
    a=2 j=1 g=1    ##......##....
    a=4 j=0 g=0    ####......#...
    a=4 j=0 g=1    ####......##..
    a=4 j=1 g=0    ####........#.
    a=4 j=1 g=1    ####........##

    Right padding needs no mask of its own: nothing real ever looks at it, and an anchor that would is not ``valid``.
    An anchor that is not ``valid`` still has defined numbers everywhere and must weigh nothing.

    The layout has tensors of its own, which share no memory with those that it was built from. They are for reading:
    where torch counts writes (not in inference mode, nor through ``.data`` or NumPy) the layout is refused after one.

    Build one with :meth:`strided`, :meth:`from_anchors` or :meth:`within`. They check values, which reads them once:
    build the layout on the CPU and move it with :meth:`to` where a host synchronisation would hurt.

    Attributes:
        anchors: [B, A] int32, number of prompt tokens (of the row, not of the document) before each rollout; -1: none.
        valid: [B, A] bool, window inside the row, no padding, ``x[a_b - 1]`` and the window in one document.
        length: P, prompt tokens per row.
        horizon: G, tokens per rollout.
        samples: n, rollouts per anchor.
        num_anchors: A.
        packed_length: S = P + A*n*G.
        lengths: [B] int64, tokens of each row that are not padding.
        prompt_start: [B, P] int32, first token of the document that each prompt token belongs to.
        position_ids: [B, S] int64, prompt positions within their document, then ``a_b + g`` likewise.
        key_ranges: :class:`KeyRanges`, what each row sees (without a sliding window).
        num_valid: number of valid anchors in the batch (a Python int).
    """

    anchors: Tensor
    valid: Tensor
    length: int
    horizon: int
    samples: int
    num_anchors: int
    packed_length: int
    lengths: Tensor
    prompt_start: Tensor
    position_ids: Tensor
    key_ranges: KeyRanges
    num_valid: int

    def __init__(
        self,
        *,
        anchors: Tensor,
        valid: Tensor,
        lengths: Tensor,
        prompt_start: Tensor,
        horizon: int,
        samples: int,
        num_valid: int,
    ) -> None:
        """Not for callers: the arguments are taken as they are. Use one of the class methods."""
        length, num_anchors = prompt_start.shape[1], anchors.shape[1]
        packed_length = _packed_length(length, num_anchors, samples, horizon)
        position_ids, key_ranges = _geometry(anchors, prompt_start, horizon, samples)
        self.__dict__.update(
            anchors=anchors,
            valid=valid,
            lengths=lengths,
            prompt_start=prompt_start,
            position_ids=position_ids,
            key_ranges=key_ranges,
            length=length,
            horizon=horizon,
            samples=samples,
            num_anchors=num_anchors,
            packed_length=packed_length,
            num_valid=num_valid,
        )
        self.__dict__["_versions"] = self._tensor_versions()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"StridedLayout is immutable; build another one instead of setting {name!r}")

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.__dict__["_versions"] = self._tensor_versions()  # those of a copy are its own

    @classmethod
    def strided(
        cls,
        batch_size: int,
        length: int,
        *,
        context: int,
        stride: int,
        horizon: int,
        samples: int,
        lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> StridedLayout:
        """Anchors ``context + b * stride`` in every row, as many as have their window inside ``length``.

        Args:
            batch_size: B.
            length: P. ``A = (length - horizon - context) // stride + 1``; a remainder is dropped.
            context: prompt tokens before the first anchor, at least 1.
            stride: distance between anchors.
            horizon: G, tokens per rollout.
            samples: n, rollouts per anchor.
            lengths: [B] int, tokens per right-padded row; None: no padding.
            document_ids: [B, P] int; a document is a run of equal ids. None: one document per row.
            device: of the layout's tensors; default: that of ``lengths`` or ``document_ids``, else torch's default.

        Raises:
            ValueError: a size below its minimum, ``length < context + horizon``, 2^31 tokens or more in a packed row,
                a shape that does not fit.
            TypeError: another type or dtype.
        """
        for name, value in (("batch_size", batch_size), ("length", length)):
            check_int(name, value, minimum=0)
        for name, value in (("context", context), ("stride", stride), ("horizon", horizon), ("samples", samples)):
            check_int(name, value, minimum=1)
        if length < context + horizon:
            raise ValueError(f"length: expected at least context + horizon = {context + horizon} tokens, got {length}")
        device = _device(device, lengths, document_ids)
        num_anchors = (length - horizon - context) // stride + 1
        _packed_length(length, num_anchors, samples, horizon)
        anchors = context + stride * torch.arange(num_anchors, dtype=torch.int32, device=device)
        return cls._build(anchors.expand(batch_size, num_anchors), length, horizon, samples, lengths, document_ids)

    @classmethod
    def from_anchors(
        cls,
        anchors: Tensor,
        length: int,
        *,
        horizon: int,
        samples: int,
        lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> StridedLayout:
        """Anchors anywhere: [B, A] int, strictly ascending per row, -1 = no anchor (only at the end of a row).

        An anchor whose window reaches past the row, into padding or over a document's edge is kept but not ``valid``.

        Raises:
            ValueError: an anchor outside ``1 .. length``, anchors not ascending, a shape that does not fit.
            TypeError: another type or dtype.
        """
        sizes: dict[str, int] = {}
        check_tensor("anchors", anchors, "B A", sizes, dtype=INTEGER)
        check_int("length", length, minimum=0)
        for name, value in (("horizon", horizon), ("samples", samples), ("the number of anchors", sizes["A"])):
            check_int(name, value, minimum=1)
        _packed_length(length, sizes["A"], samples, horizon)
        present = anchors >= 0
        outside = (anchors != -1) & ((anchors < 1) | (anchors > length))
        if outside.any():
            raise ValueError(
                f"anchors: expected 1 <= anchor <= length = {length} (or -1), got {anchors[outside][0].item()}"
            )
        descending = present[:, 1:] & (anchors[:, 1:] <= anchors[:, :-1])
        revived = present[:, 1:] & ~present[:, :-1]
        if (descending | revived).any():
            row = int((descending | revived).any(1).nonzero()[0])
            raise ValueError(
                "anchors: expected strictly ascending rows with -1 only at the end, "
                f"got row {row} = {anchors[row].tolist()}"
            )
        # A copy: what the caller does to `anchors` later is no business of this layout.
        anchors = anchors.to(torch.int32, copy=True).contiguous()
        return cls._build(anchors, length, horizon, samples, lengths, document_ids)

    @classmethod
    def within(
        cls,
        token_mask: Tensor,
        *,
        context: int,
        stride: int,
        horizon: int,
        samples: int,
        lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> StridedLayout:
        """Anchors only where ``token_mask`` [B, P] is True, every ``stride`` tokens from the start of each run of True.

        For prompt-completion data: the first rollout starts where the completion starts. Only anchors with at least
        ``context`` tokens of their document before them and with a valid window are made; rows with fewer anchors
        than the longest are filled with -1.

        Raises:
            ValueError: no row has room for an anchor, a size below its minimum, a shape that does not fit.
            TypeError: another type or dtype.
        """
        check_tensor("token_mask", token_mask, "B P", {}, dtype=torch.bool)
        for name, value in (("context", context), ("stride", stride), ("horizon", horizon), ("samples", samples)):
            check_int(name, value, minimum=1)
        batch_size, length = token_mask.shape
        lengths, prompt_start = _rows(batch_size, length, lengths, document_ids, token_mask.device)
        index = torch.arange(length, dtype=torch.int32, device=token_mask.device).expand(batch_size, length)
        starts_run = token_mask.clone()
        starts_run[:, 1:] &= ~token_mask[:, :-1] | (prompt_start[:, 1:] != prompt_start[:, :-1])
        run_start = torch.where(starts_run, index, 0).cummax(1).values
        candidate = token_mask & ((index - run_start) % stride == 0) & (index - prompt_start >= context)
        candidate &= _window_is_whole(index, lengths, prompt_start, horizon)
        num_anchors = int(candidate.sum(1).max()) if batch_size else 0
        if num_anchors == 0:
            raise ValueError(
                f"token_mask: expected a row with room for an anchor (context {context} before it and a window of "
                f"horizon {horizon} after it, in one document), got none"
            )
        anchors = torch.where(candidate, index, length).sort(1).values[:, :num_anchors]
        anchors = torch.where(anchors < length, anchors, -1)
        return cls._build(anchors, length, horizon, samples, lengths, document_ids)

    @classmethod
    def _build(
        cls,
        anchors: Tensor,
        length: int,
        horizon: int,
        samples: int,
        lengths: Tensor | None,
        document_ids: Tensor | None,
    ) -> StridedLayout:
        lengths, prompt_start = _rows(anchors.shape[0], length, lengths, document_ids, anchors.device)
        valid = _window_is_whole(anchors, lengths, prompt_start, horizon)
        return cls(
            anchors=anchors,
            valid=valid,
            lengths=lengths,
            prompt_start=prompt_start,
            horizon=horizon,
            samples=samples,
            num_valid=int(valid.sum()),
        )

    def _replace(self, **changes: object) -> StridedLayout:
        self._check_unchanged()
        names = ("anchors", "valid", "lengths", "prompt_start", "horizon", "samples", "num_valid")
        return StridedLayout(**{name: changes.get(name, getattr(self, name)) for name in names})

    def to(self, device: torch.device | str) -> StridedLayout:
        """The same layout with its tensors on ``device``."""
        if torch.device(device) == self.device:
            return self
        tensors = ("anchors", "valid", "lengths", "prompt_start")
        return self._replace(**{name: getattr(self, name).to(device, non_blocking=True) for name in tensors})

    def _copy(self) -> StridedLayout:
        """The same layout in memory of its own, which :meth:`_refill` may write to."""
        self._check_unchanged()
        found = StridedLayout.__new__(StridedLayout)
        own = {name: getattr(self, name).clone(memory_format=torch.contiguous_format) for name in _TENSORS}
        ranges = KeyRanges(*(x.clone(memory_format=torch.contiguous_format) for x in self.key_ranges))
        found.__setstate__({**self.__dict__, **own, "key_ranges": ranges})
        return found

    def _refill(self, other: StridedLayout) -> None:
        """Become ``other``, a layout of the same sizes, in the memory of this one: for work that was recorded with it.

        Only of a :meth:`_copy` that nobody else holds, and that no implementation remembers anything about: those of
        Triton and the compiled ones do not.
        """
        other._check_unchanged()
        if (self._sizes(), self.device) != (other._sizes(), other.device):
            raise ValueError(f"other: expected a layout of the sizes of {self}, got {other}")
        for name in _TENSORS:
            getattr(self, name).copy_(getattr(other, name))
        for mine, theirs in zip(self.key_ranges, other.key_ranges, strict=True):
            mine.copy_(theirs)
        self.__dict__["num_valid"] = other.num_valid
        self.__dict__["_versions"] = self._tensor_versions()

    def without_last_step(self) -> StridedLayout:
        """The same anchors with rollouts of G-1 tokens.

        The last token of a rollout is only ever a target, so a forward that scores rollouts need not run it:
        :meth:`predictors` takes the shorter rows as they are.
        """
        return self._replace(horizon=self.horizon - 1)

    def first_rows(self, count: int) -> StridedLayout:
        """The layout of the first ``count`` rows of the batch, or of all if there are no more."""
        check_int("count", count, minimum=0)
        names = ("anchors", "valid", "lengths", "prompt_start")
        rows = {name: getattr(self, name)[:count].clone() for name in names}
        return self._replace(**rows, num_valid=int(rows["valid"].sum()))

    def prompt_only(self) -> StridedLayout:
        """The same prompts without any rollout rows (horizon 0): what the prompt pass of a decoder runs over."""
        return self._replace(horizon=0)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.anchors.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the layout's tensors."""
        return self.anchors.device

    def pack(self, prompt: Tensor, rollouts: Tensor) -> Tensor:
        """Concatenate prompts [B, P, ...] and rollouts [B, A, n, G, ...] to packed rows [B, S, ...]."""
        sizes = self._sizes()
        check_tensor("prompt", prompt, "B P ...", sizes)
        check_tensor("rollouts", rollouts, "B A n G ...", sizes)
        return torch.cat([prompt, rollouts.flatten(1, 3)], 1)

    def rollouts(self, x: Tensor) -> Tensor:
        """The rollout part of packed rows: [B, S, ...] -> view [B, A, n, G, ...]."""
        check_tensor("x", x, "B S ...", self._sizes())
        return x[:, self.length :].unflatten(1, (self.num_anchors, self.samples, self.horizon))

    def step_rows(self, x: Tensor, step: int) -> Tensor:
        """The rows of all rollout tokens of one step: [B, S, ...] -> view [B, A*n, ...], ordered (anchor, sample)."""
        check_tensor("x", x, "B S ...", self._sizes())
        self._check_step(step)
        return x[:, self.length + step :: self.horizon]

    def anchor_rows(self, x: Tensor) -> Tensor:
        """The rows ``a_b - 1``, whose logits predict each anchor's first token: [B, >= P, ...] -> [B, A, ...]."""
        self._check_prompt_rows(x)
        index = (self.anchors - 1).clamp_min(0).long()
        return x[self._batch_index(), index]

    def predictors(self, x: Tensor) -> Tensor:
        """The rows whose logits predict each rollout token: step 0 prompt row ``a_b - 1``, step g the row of step g-1.

        Args:
            x: [B, S, ...] packed rows, or the rows of :meth:`without_last_step`.

        Returns:
            [B, A, n, G, ...].
        """
        return self._per_token(*self._predictors(x))

    def distinct_predictors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of :meth:`predictors`, each once, and which of them predicts each rollout token.

        All samples of an anchor have the predictor of their first token in common, so these are n-1 rows per anchor
        fewer: what :func:`ebft_kernels.linear_log_probs` takes as ``hidden`` and ``rows``.

        Args:
            x: [B, S, ...] packed rows, or the rows of :meth:`without_last_step`.

        Returns:
            rows [B*A*(1 + n*(G-1)), ...] and index [B, A, n, G] int64: ``rows[index]`` is ``predictors(x)``.
        """
        first, later = self._predictors(x)
        rows = self.join_predictors(first, later)
        ahead = self.num_anchors
        number = torch.arange(len(rows), device=x.device).view(-1, ahead + later.shape[1:4].numel())
        return rows, self._per_token(number[:, :ahead], number[:, ahead:].view(later.shape[:4]))

    def join_predictors(self, first: Tensor, later: Tensor) -> Tensor:
        """What belongs to the predictors of the rollouts' first tokens [B, A, ...] and of their later ones
        [B, A, n, G-1, ...], in the order of :meth:`distinct_predictors`: [B*A*(1 + n*(G-1)), ...]."""
        return torch.cat([first, later.flatten(1, 3)], 1).flatten(0, 1)

    def _predictors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The predictors of the rollouts' first tokens [B, A, ...] and of their later ones [B, A, n, G-1, ...]."""
        sizes, steps = self._sizes(), self.horizon
        if x.ndim >= 2 and x.shape[1] == self.packed_length - self.num_anchors * self.samples:
            sizes["S"], steps = x.shape[1], steps - 1
        check_tensor("x", x, "B S ...", sizes)
        own = x[:, self.length :].unflatten(1, (self.num_anchors, self.samples, steps))
        return self.anchor_rows(x), own[:, :, :, : self.horizon - 1]

    def _per_token(self, first: Tensor, later: Tensor) -> Tensor:
        """What belongs to the first tokens [B, A, ...] of all samples, and to each later one: [B, A, n, G, ...]."""
        first = first[:, :, None, None]
        return torch.cat([first.expand(-1, -1, self.samples, *first.shape[3:]), later], 3)

    def windows(self, x: Tensor) -> Tensor:
        """The ground-truth windows ``x[a_b .. a_b + G)``: [B, >= P, ...] -> [B, A, G, ...] (packed rows will do)."""
        self._check_prompt_rows(x)
        steps = torch.arange(self.horizon, device=self.device)
        index = (self.anchors.clamp_min(0)[:, :, None] + steps).clamp_max(max(self.length - 1, 0)).long()
        return x[self._batch_index()[:, :, None], index]

    def visible_keys(self, window: int | None = None) -> KeyRanges:
        """What each row sees, with a sliding window folded in: only keys less than ``window`` positions back.

        ``window=None`` gives :attr:`key_ranges`. Distances are counted in tokens of the sequence that a rollout
        continues, so the rollout token ``(b, j, g)`` stands at ``a_b + g``.
        """
        self._check_unchanged()
        window = self._narrowing(window)
        return self.key_ranges if window is None else slide_key_ranges(self.key_ranges, window)

    def _narrowing(self, window: int | None) -> int | None:
        """A checked sliding window; None where it hides nothing, as a window longer than every sequence does."""
        if window is None:
            return None
        check_int("window", window, minimum=1, bounded=False)
        return None if window >= self.length + self.horizon else window

    def visible_pairs(self, window: int | None = None) -> int:
        """Pairs of a query row and a key that it sees, per head, in the whole batch: what attention must compute."""
        start, end, own = self.visible_keys(window)
        row = torch.arange(self.packed_length, device=self.device)
        return int(((end - start).clamp_min(0) + row + 1 - own).sum())

    def dense_mask(self, window: int | None = None, *, block: str = "causal") -> Tensor:
        """[B, 1, S, S] bool, True = may attend. For tests, small inputs and other trainers: it is quadratic in S.

        Args:
            window: sliding window: only keys less than ``window`` positions back.
            block: "causal", or "full": a rollout token sees the later tokens of its rollout too.
        """
        ranges, own_end = self.visible_keys(window), self._own_end(block)
        if kernels := _kernels(self.anchors):
            return kernels.dense_mask(*ranges, length=self.length, horizon=self.horizon, full=block == "full")
        prefix_start, prefix_end, own_start, own_end = (r[:, None, :, None] for r in (*ranges, own_end))
        key = torch.arange(self.packed_length, device=self.device)
        return ((key >= prefix_start) & (key < prefix_end)) | ((key >= own_start) & (key < own_end))

    def mask_mod(
        self, window: int | None = None, *, block: str = "causal"
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same mask as a FlexAttention predicate ``(batch, head, query, key) -> bool``."""
        prefix_start, prefix_end, own_start = self.visible_keys(window)
        own_end = self._own_end(block)

        def visible(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            in_prefix = (key >= prefix_start[batch, query]) & (key < prefix_end[batch, query])
            in_rollout = (key >= own_start[batch, query]) & (key < own_end[batch, query])
            return in_prefix | in_rollout

        return visible

    def from_reference_order(self, x: Tensor) -> Tensor:
        """[B*n, P + A*G, ...], one row per sample, rollout tokens ordered (step, anchor) -> packed rows [B, S, ...].

        That is the layout of the method's authors; the prompt is taken from the first sample of each row.
        """
        rows, length = self.batch_size * self.samples, self.length + self.num_anchors * self.horizon
        check_tensor("x", x, f"{rows} {length} ...", {})
        x = x.unflatten(0, (self.batch_size, self.samples))
        tokens = x[:, :, self.length :].unflatten(2, (self.horizon, self.num_anchors))  # [B, n, G, A, ...]
        return self.pack(x[:, 0, : self.length], tokens.movedim(3, 1))

    def to_reference_order(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`from_reference_order`: packed rows [B, S, ...] -> [B*n, P + A*G, ...]."""
        tokens = self.rollouts(x).movedim(1, 3).flatten(2, 3)  # [B, n, G*A, ...]
        prompt = x[:, None, : self.length].expand(-1, self.samples, *x[:, : self.length].shape[1:])
        return torch.cat([prompt, tokens], 2).flatten(0, 1)

    def draw(self, row: int = 0) -> str:
        """One row's mask in characters, '#' = may attend; see the class docstring."""
        names = [f"prompt {i}" for i in range(self.length)]
        names += [
            f"a={a} j={j} g={g}"
            for a in self.anchors[row].tolist()
            for j in range(self.samples)
            for g in range(self.horizon)
        ]
        mask = self.dense_mask()[row, 0].tolist()
        return "\n".join(
            f"{name:<15}{''.join('#' if seen else '.' for seen in line)}"
            for name, line in zip(names, mask, strict=True)
        )

    def __repr__(self) -> str:
        return (
            f"StridedLayout(batch_size={self.batch_size}, length={self.length}, num_anchors={self.num_anchors}, "
            f"samples={self.samples}, horizon={self.horizon}, packed_length={self.packed_length}, "
            f"device='{self.device}')"
        )

    def _tensor_versions(self) -> tuple[int, ...] | None:
        """How often each tensor was written to; None where torch does not count (inference mode, traced code)."""
        if torch.compiler.is_compiling():
            return None
        tensors = (*(getattr(self, name) for name in _TENSORS), *self.key_ranges)
        return None if any(x.is_inference() for x in tensors) else tuple(x._version for x in tensors)

    def _check_unchanged(self) -> None:
        """Raise ValueError if somebody wrote into a tensor of the layout: masks and windows would not fit together."""
        if not torch.compiler.is_compiling() and self._versions != self._tensor_versions():
            raise ValueError("layout: expected its tensors as they were built, got some that were changed in place")

    def _own_end(self, block: str) -> Tensor:
        """[B, S] int32, end of the tokens of its own rollout that each row sees; those of prompt rows are none."""
        check_option("block", block, ("causal", "full"))
        row = torch.arange(self.packed_length, dtype=torch.int32, device=self.device)
        if block == "full":
            row = torch.where(row < self.length, row, self.key_ranges.own_start + self.horizon - 1)
        return (row + 1).expand(self.batch_size, -1)

    def _sizes(self) -> dict[str, int]:
        return {
            "B": self.batch_size,
            "P": self.length,
            "A": self.num_anchors,
            "n": self.samples,
            "G": self.horizon,
            "S": self.packed_length,
        }

    def _batch_index(self) -> Tensor:
        return torch.arange(self.batch_size, device=self.device)[:, None]  # [B, 1]

    def _check_prompt_rows(self, x: Tensor) -> None:
        self._check_unchanged()
        check_tensor("x", x, "B ...", self._sizes())
        if x.ndim < 2 or x.shape[1] < self.length:
            raise ValueError(f"x: expected at least P = {self.length} rows, got shape {list(x.shape)}")

    def _check_step(self, step: int) -> None:
        check_int("step", step, minimum=0)
        if step >= self.horizon:
            raise ValueError(f"step: expected less than horizon = {self.horizon}, got {step}")


def slide_key_ranges(ranges: KeyRanges, window: int) -> KeyRanges:
    """Key ranges [B, S] narrowed to the last ``window`` positions up to each row's own."""
    prefix_start, prefix_end, own_start = ranges
    row = torch.arange(own_start.shape[1], dtype=torch.int32, device=own_start.device)
    # Prompt row i: prefix_end = own_start = i + 1; rollout row (b, j, g): prefix_end = a_b, row - own_start = g.
    position = prefix_end + row - own_start
    return KeyRanges(
        torch.maximum(prefix_start, position - window + 1),
        prefix_end,
        torch.maximum(own_start, row - window + 1),
    )


def check_layout(layout: object) -> None:
    """Raise TypeError unless ``layout`` is a :class:`StridedLayout`, ValueError if its tensors were changed."""
    if not isinstance(layout, StridedLayout):
        raise TypeError(f"layout: expected a StridedLayout, got {type(layout).__name__}")
    layout._check_unchanged()


def _packed_length(length: int, num_anchors: int, samples: int, horizon: int) -> int:
    """S, checked before anything of that size is allocated."""
    packed_length = length + num_anchors * samples * horizon
    if packed_length >= INT_LIMIT:
        raise ValueError(
            f"samples, horizon: expected packed rows of less than 2^31 tokens, got {length} + {num_anchors} anchors * "
            f"{samples} samples * {horizon} tokens = {packed_length}"
        )
    return packed_length


def _device(device: torch.device | str | None, *tensors: Tensor | None) -> torch.device | None:
    """Where new tensors are to be; None: torch's default device."""
    if device is not None:
        return torch.device(device)
    return next((x.device for x in tensors if isinstance(x, Tensor)), None)


def _rows(
    batch_size: int, length: int, lengths: Tensor | None, document_ids: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Checked ``lengths`` [B] int64 and the first token of each prompt token's document [B, P] int32."""
    if lengths is None:
        lengths = torch.full((batch_size,), length, device=device)
    else:
        check_tensor("lengths", lengths, "B", {"B": batch_size}, dtype=INTEGER, device=device)
        if ((lengths < 0) | (lengths > length)).any():
            raise ValueError(f"lengths: expected 0 <= length <= {length}, got {lengths.tolist()}")
    start = torch.zeros((batch_size, length), dtype=torch.int32, device=device)
    if document_ids is not None:
        check_tensor("document_ids", document_ids, "B P", {"B": batch_size, "P": length}, dtype=INTEGER, device=device)
        index = torch.arange(1, length, dtype=torch.int32, device=device)
        start[:, 1:] = torch.where(document_ids[:, 1:] != document_ids[:, :-1], index, 0)
        start = start.cummax(1).values if length else start
    return lengths.to(torch.int64, copy=True), start


def _window_is_whole(anchors: Tensor, lengths: Tensor, prompt_start: Tensor, horizon: int) -> Tensor:
    """[B, A] bool: the window lies in the row, before its padding, in the document of the token before it."""
    inside = (anchors >= 1) & (anchors + horizon <= lengths[:, None])
    if prompt_start.shape[1] == 0:
        return inside
    last = prompt_start.shape[1] - 1
    before = prompt_start.gather(1, (anchors - 1).clamp(0, last).long())
    end = prompt_start.gather(1, (anchors + horizon - 1).clamp(0, last).long())
    return inside & (before == end)


def _kernels(x: Tensor) -> ModuleType | None:
    """What writes the large tensors that belong to ``x``; None: plain PyTorch does, as for code that is traced.

    Within a transform of ``torch.func`` new tensors are wrapped, and have no memory that a kernel could write to.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or transforming():
        return None
    if x.device.type == "cuda" and not _triton.why_not("cuda"):
        from . import _layout_triton

        return _layout_triton
    return None if _native.why_not(x.device.type) else _layout_native


def _geometry(anchors: Tensor, prompt_start: Tensor, horizon: int, samples: int) -> tuple[Tensor, KeyRanges]:
    """Position ids [B, S] and key ranges [B, S] of all packed rows."""
    if kernels := _kernels(anchors):
        position_ids, ranges = kernels.geometry(anchors, prompt_start, horizon, samples)
        return position_ids, KeyRanges(*ranges)
    (batch_size, length), num_anchors, device = prompt_start.shape, anchors.shape[1], anchors.device
    prompt = torch.arange(length, dtype=torch.int32, device=device).expand(batch_size, length)
    end = anchors.clamp_min(0)  # [B, A]
    if length:
        start = prompt_start.gather(1, (end - 1).clamp_min(0).long())
    else:
        start = torch.zeros_like(end)
    step = torch.arange(horizon, dtype=torch.int32, device=device)
    first_row = length + horizon * torch.arange(num_anchors * samples, dtype=torch.int32, device=device)

    def per_token(x: Tensor) -> Tensor:  # [B, A] -> [B, A*n*G]
        return x[:, :, None].expand(-1, -1, samples * horizon).flatten(1)

    own_start = first_row[:, None].expand(-1, horizon).flatten().expand(batch_size, -1)
    positions = (end - start)[:, :, None, None] + step.expand(samples, horizon)  # [B, A, n, G]
    position_ids = torch.cat([prompt - prompt_start, positions.flatten(1)], 1).long()
    ranges = KeyRanges(
        prefix_start=torch.cat([prompt_start, per_token(start)], 1),
        prefix_end=torch.cat([prompt + 1, per_token(end)], 1),
        own_start=torch.cat([prompt + 1, own_start], 1),
    )
    return position_ids, ranges
