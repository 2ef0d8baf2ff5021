"""Dissect a model: find the feed-forward networks, attention and experts of each layer by data flow, never by names.

The model runs once on a few tokens, and the input and output of every linear are kept. A feed-forward network is three (or
two) linears for which `down`'s input is `act(gate) * up` (or `act(up)`) in numbers. Parts that cannot be proved stay dense
and are reported.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from moyu.errors import UserError
from moyu.model.anatomy import Anatomy, Block, Piece
from moyu.model.calls import Adapters, Call, is_linear_call, obstacle
from moyu.model.experts import find_experts
from moyu.model.finite import require_finite
from moyu.model.networks import find_networks
from moyu.model.quantised import QuantisedLinear
from moyu.model.queries import find_attentions

PROBE_TOKENS = 6
PROBE_BATCH = 2  # sequences; with one alone, rows in another order than the tokens' would go unnoticed
DEPTHS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers", "num_layers")


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model's forward can be asked for the logits of its last positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def text_config(model: nn.Module):
    """The configuration of the language model proper."""
    return model.config.get_text_config(decoder=True)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def setting(config: object, name: str) -> object:
    """A value of a configuration; None if it has none, or if values differ between layers and reading one raises."""
    try:
        return getattr(config, name, None)
    except Exception:  # of a class that the oldest supported transformers does not have
        return None


APPLIED = "_moyu_applied"  # among the attributes of a module that an applied plan has changed


def require_dense(model: nn.Module) -> None:
    """Refuse a model that a plan is applied to, or of which a part has one: its numbers are not its own."""
    if any(APPLIED in vars(module) for module in model.modules()):
        raise UserError(
            "a plan is already applied to this model",
            "restore() it first; `model.moyu_applied.restore()` where transformers loaded the model with its plan",
        )


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers: among the module lists that run for tokens and are as long as the model is deep, the largest."""
    return _called_stacks(model)[0][1]


def _called_stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList, list[list[Call]]]]:
    """The lists of layers that run for tokens, with the calls inside each layer. The decoder's own list comes first."""
    stacks = _stacks(model)
    calls = iter(_probe(model, [(f"{n}.{i}", layer) for n, stack in stacks.items() for i, layer in enumerate(stack)]))
    found = [(name, stack, [next(calls) for _ in stack]) for name, stack in stacks.items()]
    found = [item for item in found if any(item[2])]
    if not found:
        raise UserError(f"{type(model).__name__} has no list of decoder layers", "is it a causal LM of transformers?")
    config = text_config(model)
    depths = {setting(config, name) for name in DEPTHS}

    def size(item: tuple) -> tuple[bool, int]:
        return len(item[1]) in depths, sum(p.numel() for p in item[1].parameters())

    return sorted(found, key=size, reverse=True)


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The module lists that are not inside another list."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{n}.") for n in found):
            found[name] = module
    return found


@torch.no_grad()
def dissect(model: nn.Module, dense_layers: tuple[int, ...] = ()) -> Anatomy:
    """Find and prove every block of a causal LM. Runs the model once on a few tokens.

    dense_layers: layers to leave dense; -1 is the last. Raises UserError, with the reasons, if no network is found, and for a
    model that a plan is applied to.
    """
    require_dense(model)
    stacks = _called_stacks(model)
    main = stacks[0][1]
    left = _chosen(dense_layers, len(main))
    layers = [(f"{name}.{i}", layer) for name, stack, _ in stacks for i, layer in enumerate(stack)]
    calls = [seen for _, _, each in stacks for seen in each]
    anatomy = Anatomy(nn.ModuleList(layer for _, layer in layers), [], [], [], dense_layers=tuple(sorted(left)))
    taken: set[int] = set()  # a module shared by several layers belongs to the first of them
    last = len(main)
    for index, (place, _) in enumerate(layers):
        if index in left:
            anatomy.blocks.append(Block(index, {}))
            anatomy.gaps.append(f"layer {index}: left dense as asked")
            continue
        fresh = [c for c in calls[index] if id(c.module) not in taken]
        here = f"{place.rpartition('.')[0]} layer {index}" if index >= len(main) else f"layer {index}"
        if index < len(main) and not calls[index]:
            anatomy.blocks.append(Block(index, {}))
            anatomy.gaps.append(f"layer {index}: does not run for tokens alone")
            continue
        adapters = Adapters(fresh)
        networks = find_networks(index, fresh, adapters)
        experts, gaps = find_experts(index, fresh)
        experts = [e for e in experts if id(e.module) not in adapters.adapted]
        strange = next((s for b in networks if (s := _rows(b, fresh)) not in _ROWS), None)
        if strange is not None:
            networks, experts = [], []
            gaps = [f"layer {index}: its network runs on rows {strange}, which are not the tokens {_ROWS[0]}"]
        own = {id(p.module) for b in networks for p in b.pieces.values()}
        linears = [c for c in fresh if is_linear_call(c) and id(c.module) not in own | adapters.beside]
        attentions, unproved = find_attentions(fresh, linears, _heads(model), _ROWS[0], adapters.around)
        if index >= len(main) and not networks and not experts and not attentions:
            anatomy.blocks.append(Block(index, {}))
            anatomy.gaps += [f"{here}: attention or mixer, {unproved}"] if unproved else []
            continue
        last = max(last, index + 1)
        if not networks and not experts and not gaps and len(fresh) == len(calls[index]):
            gaps = [f"{here}: {obstacle(fresh) or _WITHOUT}"]
        if not networks and not experts and adapters.adapted:
            on = ", ".join(adapters.adapted.values())
            gaps = [f"layer {index}: adapters on {on}, and none may be dropped: merge them first (merge_and_unload)"]
        anatomy.gaps += gaps
        anatomy.experts += experts
        block = networks[0] if networks else Block(index, {})
        for number, further in enumerate(networks[1:], 1):
            further.expert = -number
        anatomy.further += networks[1:]
        for part, attention in zip([block, *networks[1:]], attentions, strict=False):
            part.attend(attention)
        anatomy.gaps += [f"{here}: attention or mixer, {unproved}"] if unproved else []
        own |= {id(p.module) for b in (block, *networks[1:]) for p in b.pieces.values()}
        taken |= own | {id(e.module) for e in experts}
        anatomy.blocks.append(block)
    anatomy.layers = nn.ModuleList(list(anatomy.layers)[:last])
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    if isinstance(head, QuantisedLinear):
        anatomy.head = Block(last, {"head": Piece(head)})
    anatomy.blocks = anatomy.blocks[:last]
    if not anatomy.experts and not any(b.has_ffn for b in anatomy.blocks):
        reasons = "; ".join(dict.fromkeys(anatomy.gaps))
        raise UserError(
            f"{type(model).__name__} has no feed-forward network that MOYU can prove ({reasons})",
            "it would run dense; choose another model",
        )
    return anatomy


def _heads(model: nn.Module) -> int:
    """Query heads by the configuration; 0 if it does not tell."""
    heads = setting(text_config(model), "num_attention_heads")
    return heads if isinstance(heads, int) else 0


_ROWS = (torch.Size((PROBE_BATCH, PROBE_TOKENS // PROBE_BATCH)), torch.Size((PROBE_TOKENS,)))


def _rows(block: Block, calls: list[Call]) -> torch.Size:
    """The shape of the rows that a network ran on in the probe."""
    up = block.pieces["up"].module
    return torch.Size(next(c.x.shape[:-1] for c in calls if c.module is up))


_WITHOUT = "no linear takes an input that follows from earlier linears, by a known formula or by the module itself"


def _chosen(dense_layers: tuple[int, ...], depth: int) -> set[int]:
    """Layers by number, negative ones counted from the end. Raises UserError for a layer that does not exist."""
    for layer in dense_layers:
        if not -depth <= layer < depth:
            raise UserError(f"there is no layer {layer} to leave dense", f"the model has layers 0 to {depth - 1}")
    return {layer % depth for layer in dense_layers}


def _probe(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> list[list[Call]]:
    """All calls of modules inside each layer, in the order in which they returned."""
    calls: list[list[Call]] = [[] for _ in layers]
    handles = []
    for index, (place, layer) in enumerate(layers):
        for name, module in layer.named_modules(prefix=place):

            def record(module, inputs, kwargs, output, index=index, name=name):
                tensors = (*inputs, *kwargs.values())
                kept = output.clone() if isinstance(output, Tensor) else output  # a later module may change it in place
                calls[index].append(Call(name, module, tensors, kept, tuple(kwargs)))

            handles.append((module, record))
    registered = []
    device = next(model.parameters()).device
    config = text_config(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (PROBE_BATCH, PROBE_TOKENS // PROBE_BATCH), generator=generator).to(
        device
    )
    training = model.training
    try:
        # Hooks are set only here, because is_linear() refuses modules that carry other hooks.
        registered = [m.register_forward_hook(r, with_kwargs=True) for m, r in handles]
        model.eval()
        with torch.no_grad():
            output = model(input_ids=ids, use_cache=False)
    finally:
        for handle in registered:
            handle.remove()
        model.train(training)
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and not bool(torch.isfinite(logits).all()):
        require_finite(model, type(model).__name__, "nothing can be proved of such layers: mend the weight")
    return calls
