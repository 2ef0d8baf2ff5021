"""The native decode step against float64: rows of different lengths, levels in and out, and what it refuses."""

from array import array

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moyu.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built")

D, F, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, LAYERS, CAPACITY = 32, 48, 4, 2, 8, 40, 2, 12
SHAPES = {
    "q": (HEADS * HEAD_DIM, D),
    "k": (KV_HEADS * HEAD_DIM, D),
    "v": (KV_HEADS * HEAD_DIM, D),
    "o": (D, HEADS * HEAD_DIM),
    "gate": (F, D),
    "up": (F, D),
    "down": (D, F),
}
COLUMNS = tuple(SHAPES)  # the order of DecodeColumns
NETWORKS = {"separate": 0, "neurons": 1, "gate_first": 2, "up_first": 3}  # enum Network
PAST = (0, 3, 7)
# Sums of at most 48 products in fp32, through two layers; each adds a relative error of a few 6e-8.
TOLERANCE = 1e-5


class Model:
    """Random weights, and keys and values of rows of the lengths PAST; `native` and `truth` compute one step."""

    def __init__(self, network: str) -> None:
        self.network, self.generator = network, torch.Generator().manual_seed(0)
        self.weights = [{n: self.draw(*shape) * shape[1] ** -0.5 for n, shape in SHAPES.items()} for _ in range(LAYERS)]
        self.biases = [{n: self.draw(shape[0]) * 0.1 for n, shape in SHAPES.items()} for _ in range(LAYERS)]
        self.norms = [[1 + 0.1 * self.draw(D) for _ in range(2)] for _ in range(LAYERS)]
        self.last, self.embedding, self.head = (
            1 + 0.1 * self.draw(D),
            self.draw(VOCABULARY, D),
            self.draw(VOCABULARY, D),
        )
        self.factors = 0.5 + torch.rand(F, generator=self.generator)
        angles = torch.rand(len(PAST), HEAD_DIM // 2, generator=self.generator).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.keys, self.values = (self.draw(LAYERS, len(PAST), KV_HEADS, CAPACITY, HEAD_DIM) for _ in range(2))
        self.ids, self.past = torch.tensor([3, 0, VOCABULARY - 1]), torch.tensor(PAST)
        self.scale, self.threshold = HEAD_DIM**-0.5, 0.4
        self.held: list[Tensor] = []

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def by_columns(self, name: str) -> bool:
        return name in "qkvo" or self.network == "separate" or name == "down"

    def decides(self, name: str) -> bool:
        """Whether this linear's columns are skipped by a mask of its own."""
        return name in "qkvo" or self.network == "separate"

    def decoder(self):
        extension, decoder = cpu.extension(), cpu.extension().Decoder()
        for weights, biases, norms in zip(self.weights, self.biases, self.norms, strict=True):
            layer = extension.Layer()
            for name, weight in weights.items():
                linear = self.linear(weight, self.by_columns(name), biases[name])
                linear.threshold = self.threshold
                linear.factor = self.factors.data_ptr() if name == "down" else 0
                setattr(layer, name, linear)
            layer.before_attention, layer.before_network = map(self.norm, norms)
            layer.heads, layer.kv_heads, layer.head_dim, layer.scale = HEADS, KV_HEADS, HEAD_DIM, self.scale
            layer.network, layer.act = NETWORKS[self.network], cpu.activation_code("silu")
            decoder.add(layer)
        ends = extension.Ends()
        ends.embedding, ends.head = self.linear(self.embedding, False), self.linear(self.head, False)
        ends.norm = self.norm(self.last)
        decoder.ends = ends
        return decoder

    def linear(self, weight: Tensor, by_columns: bool, bias: Tensor | None = None):
        own = weight.T.contiguous() if by_columns else weight
        self.held.append(own)
        linear = cpu.extension().Linear()
        linear.weight, linear.stride, linear.by_columns = own.data_ptr(), own.stride(0), by_columns
        linear.q, linear.n = weight.shape
        linear.bias = 0 if bias is None else bias.data_ptr()
        return linear

    def norm(self, weight: Tensor):
        norm = cpu.extension().Norm()
        norm.weight, norm.eps = weight.data_ptr(), 1e-6
        return norm

    def step(self, given: dict | None = None, taken: dict | None = None):
        """What one step takes, its logits (3, V), and the keys and values (2, L, 3, H, capacity, D) that it appends to."""
        both = torch.stack([self.keys, self.values])
        memory, columns = array("q"), array("q")
        for layer in range(LAYERS):
            for cache in both:
                memory.extend((cache[layer].data_ptr(), *cache[layer].stride()[:2]))
            memory.extend(self.level(given, taken, layer, "neurons"))
            for name in COLUMNS:
                columns.extend(self.level(given, taken, layer, name))
        logits = torch.empty(len(PAST), VOCABULARY)
        step = cpu.extension().Step()
        step.rows, step.threads, step.capacity, step.rotary, step.angles_row = (
            len(PAST),
            2,
            CAPACITY,
            HEAD_DIM,
            HEAD_DIM,
        )
        step.ids, step.logits, step.past = self.ids.data_ptr(), logits.data_ptr(), self.past.data_ptr()
        angles = array("q", [self.cos.data_ptr(), self.sin.data_ptr()])
        step.angles, step.angles_count = angles.buffer_info()[0], 1
        step.memory, step.columns = memory.buffer_info()[0], columns.buffer_info()[0]
        return step, logits, both, (memory, columns, angles)

    def level(self, given: dict | None, taken: dict | None, layer: int, name: str) -> tuple[int, int, int]:
        mask = None if given is None else given.get((layer, name))
        out = None if taken is None else taken.setdefault((layer, name), torch.full((len(PAST), width(name)), 7).byte())
        return (*((0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))), 0 if out is None else out.data_ptr())

    def native(self, given: dict | None = None, taken: dict | None = None, *, edit=lambda step: None):
        step, logits, cache, _held = self.step(given, taken)
        edit(step)
        self.decoder().step(step)
        return logits, cache

    def truth(self, given: dict | None = None):
        """The same in float64, row by row; also the masks that were taken."""
        taken, cache, rows = {}, torch.stack([self.keys, self.values]).double(), []
        for r, past in enumerate(self.past.tolist()):
            hidden = self.embedding[self.ids[r]].double()
            for layer in range(LAYERS):
                hidden = hidden + self.attend(
                    layer, r, past, self.normed(hidden, self.norms[layer][0]), cache, given, taken
                )
                hidden = hidden + self.feed(layer, r, self.normed(hidden, self.norms[layer][1]), given, taken)
            rows.append(self.head.double() @ self.normed(hidden, self.last))
        return torch.stack(rows), cache, {key: torch.stack(masks) for key, masks in taken.items()}

    def attend(self, layer: int, row: int, past: int, x: Tensor, cache: Tensor, given, taken) -> Tensor:
        q, k, v = (self.product(layer, row, n, x, given, taken).reshape(-1, HEAD_DIM) for n in "qkv")
        cache[0, layer, row, :, past], cache[1, layer, row, :, past] = self.turned(row, k), v
        group, y = HEADS // KV_HEADS, []
        for head, query in enumerate(self.turned(row, q)):
            keys, values = cache[:, layer, row, head // group, : past + 1]
            y.append((keys @ query * self.scale).softmax(0) @ values)
        return self.product(layer, row, "o", torch.cat(y), given, taken)

    def turned(self, row: int, heads: Tensor) -> Tensor:
        a, b = heads.chunk(2, 1)
        return heads * self.cos[row].double() + torch.cat([-b, a], 1) * self.sin[row].double()

    def feed(self, layer: int, row: int, x: Tensor, given, taken) -> Tensor:
        gate, up = (self.product(layer, row, n, x, given, taken) for n in ("gate", "up"))
        value = functional.silu(gate) * up
        if self.network == "neurons":
            mask = torch.ones(F, dtype=torch.bool)
        else:
            mask = (functional.silu(gate) if self.network == "gate_first" else up).abs() * self.factors > self.threshold
        if self.network != "separate":
            mask = mask if given is None or (layer, "neurons") not in given else given[layer, "neurons"][row]
            taken.setdefault((layer, "neurons"), []).append(mask)
            value = value * mask
        return self.product(layer, row, "down", value, given, taken)

    def product(self, layer: int, row: int, name: str, x: Tensor, given, taken) -> Tensor:
        if self.decides(name):
            mask = x.abs() * (self.factors if name == "down" else 1) > self.threshold
            mask = mask if given is None or (layer, name) not in given else given[layer, name][row]
            taken.setdefault((layer, name), []).append(mask)
            x = x * mask
        return self.weights[layer][name].double() @ x + self.biases[layer][name].double()

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * weight.double()


def width(name: str) -> int:
    return F if name == "neurons" else SHAPES[name][1]


def assert_true(native: tuple[Tensor, Tensor], truth: tuple) -> None:
    for got, expected in zip(native, truth[:2], strict=True):
        error = float((got - expected).abs().max() / expected.abs().max())
        assert error <= TOLERANCE, f"relative error {error:.2e}"


def flipped(masks: dict) -> dict:
    """The masks with every fifth unit the other way round."""
    return {key: mask ^ (torch.arange(mask.shape[1]) % 5 == 0) for key, mask in masks.items()}


@pytest.fixture(params=NETWORKS)
def model(request):
    return Model(request.param)


def test_every_row_has_a_length_of_its_own(model):
    truth = model.truth()
    assert_true(model.native(), truth)
    untouched = torch.ones(len(PAST), CAPACITY, dtype=torch.bool)
    untouched[range(len(PAST)), PAST] = False
    before, after = torch.stack([model.keys, model.values]), model.native()[1]
    assert torch.equal(after.movedim(4, 3)[:, :, untouched], before.movedim(4, 3)[:, :, untouched])


def test_a_mask_has_rows_longer_than_the_lengths(model):
    closed = torch.ones(len(PAST), CAPACITY, dtype=torch.bool)
    closed[1, 2] = closed[2, :4] = False
    alone = Model(model.network)  # closed positions are as if they were not there
    for r, past in enumerate(PAST):
        open_ = closed[r, :past].nonzero()[:, 0]
        for cache in (alone.keys, alone.values):
            cache[:, r, :, : len(open_)] = cache[:, r][:, :, open_]
        alone.past[r] = len(open_)

    def edit(step):
        step.mask, step.mask_row = closed.data_ptr(), CAPACITY

    assert_true(model.native(edit=edit)[:1], alone.truth()[:1])


def test_the_levels_that_a_step_took_are_told(model):
    taken = {}
    logits, _ = model.native(taken=taken)
    _, _, expected = model.truth()
    for key, mask in expected.items():
        assert torch.equal(taken[key].bool(), mask), key
        assert mask.any() and (bool(mask.all()) is (model.network == key[1] == "neurons"))
    assert all((taken[key] == 7).all() for key in taken.keys() - expected.keys())  # nothing decides there
    # Rows that share a mask are multiplied together, others one by one: sums in another order.
    assert (model.native(taken)[0] - logits).abs().max() <= TOLERANCE * logits.abs().max()


def test_levels_are_replayed(model):
    levels = flipped(model.truth()[2])
    taken = {}
    native = model.native(levels, taken)
    assert_true(native, model.truth(levels))
    assert all(torch.equal(taken[key].bool(), mask) for key, mask in levels.items())
    with pytest.raises(AssertionError, match="relative error"):
        assert_true(native, model.truth())


def test_what_a_replay_leaves_open_is_decided(model):
    levels = {key: mask for key, mask in flipped(model.truth()[2]).items() if key[0] == 0}
    assert_true(model.native(levels), model.truth(levels))


def corruptions():
    def scale(model):
        model.scale *= 1.02

    def weight(model):
        model.weights[1]["up"] *= 1.02

    def bias(model):
        model.biases[0]["v"] *= 1.1

    def length(model):
        model.past[1] -= 1

    def level(model):
        model.levels[0, "v"][2, 4] ^= True

    return [scale, weight, bias, length, level]


@pytest.mark.parametrize("corrupt", corruptions(), ids=lambda change: change.__name__)
def test_a_corrupted_constant_is_noticed(model, corrupt):
    levels = model.truth()[2]
    truth, other = model.truth(levels), Model(model.network)
    other.levels = {key: mask.clone() for key, mask in levels.items()}
    assert_true(other.native(other.levels), truth)
    corrupt(other)
    with pytest.raises(AssertionError, match="relative error"):
        assert_true(other.native(other.levels), truth)


# --------------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("token", [-1, VOCABULARY, 10**9, -(2**63)])
def test_ids_outside_the_vocabulary_are_refused(token):
    model = Model("separate")
    model.ids[1] = token
    with pytest.raises(IndexError, match=rf"token id of row 1 is {token}, it must be in \[0, {VOCABULARY}\)"):
        model.native()


@pytest.mark.parametrize("past", [-1, CAPACITY, 2**40])
def test_lengths_outside_the_cache_are_refused(past):
    model = Model("separate")
    model.past[2] = past
    with pytest.raises(IndexError, match=rf"length of row 2 is {past}, it must be in \[0, {CAPACITY}\)"):
        model.native()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", 0, "1 to 32 rows, got 0"),
        ("rows", 33, "1 to 32 rows, got 33"),
        ("threads", 0, "threads >= 1, got 0"),
        ("past", 0, "lengths and the memory"),
        ("memory", 0, "lengths and the memory"),
        ("ids", 0, "ids or hidden states"),
        ("logits", 0, "needs logits"),
        ("angles", 0, "width of cos and sin"),
        ("rotary", 3, "width of cos and sin"),
        ("rotary", HEAD_DIM + 2, "wider than the heads"),
    ],
)
def test_a_step_that_lacks_something_is_refused(field, value, message):
    model = Model("separate")
    with pytest.raises(ValueError, match=message):
        model.native(edit=lambda step: setattr(step, field, value))


def test_a_mask_that_is_too_short_is_refused():
    model, mask = Model("separate"), torch.ones(len(PAST), PAST[-1], dtype=torch.bool)

    def edit(step):
        step.mask, step.mask_row = mask.data_ptr(), mask.shape[1]

    with pytest.raises(ValueError, match="fewer positions"):
        model.native(edit=edit)


def test_unknown_codes_and_fields_are_refused():
    extension = cpu.extension()
    for thing, field, code, message in (
        (extension.Step(), "dtype", 3, "dtype has no value 3"),
        (extension.Linear(), "kind", -1, "kind has no value -1"),
        (extension.Layer(), "act", 99, "act has no value 99"),
    ):
        with pytest.raises(ValueError, match=message):
            setattr(thing, field, code)
    with pytest.raises(AttributeError):
        extension.Step().row = 1


def test_a_step_without_layers_is_the_ends_alone():
    model = Model("separate")
    step, logits, _, _held = model.step()
    decoder, whole = cpu.extension().Decoder(), model.decoder()
    decoder.ends = whole.ends
    step.memory, step.rotary = 0, 0
    decoder.step(step)
    expected = torch.stack(
        [model.head.double() @ model.normed(x.double(), model.last) for x in model.embedding[model.ids]]
    )
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_a_decoder_without_layers_or_ends_is_refused():
    model, extension = Model("separate"), cpu.extension()
    step, logits, _, _held = model.step()
    with pytest.raises(ValueError, match="an embedding and a head"):
        extension.Decoder().step(step)
    decoder = model.decoder()
    decoder.ends = extension.Ends()
    with pytest.raises(ValueError, match="an embedding and a head"):
        decoder.step(step)
    step.ids, step.logits, step.hidden = 0, 0, logits.data_ptr()
    with pytest.raises(ValueError, match="no layers"):
        extension.Decoder().step(step)
    with pytest.raises(ValueError, match="heads > 0"):
        decoder.add(extension.Layer())


@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_whose_linears_do_not_fit_is_refused(name):
    model = Model("separate")
    model.weights[1][name] = model.draw(SHAPES[name][0] + 1, SHAPES[name][1])
    with pytest.raises(ValueError, match=r"must be \(\d+, \d+\)"):
        model.decoder()
