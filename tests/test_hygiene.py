"""What a call does to the model is undone or reported, on a worker of this module's own."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import indent
from typing import Any

import pytest

from interp_kernel.client import InterpClient
from interp_kernel.session import Session
from interp_kernel.spec import WorkerSpec
from tests.helpers_worker import DEMO, press_stop, run_cell, sessions

# Everything that a call could notice of its predecessor, as plain values.
STATE = """
import torch
from torch import nn
ids = torch.tensor([[5, 6, 7, 8]])
out = model(ids, output_hidden_states=True, labels=ids)
loss = out.loss
state = {
    'logits': out.logits.detach().clone(), 'hidden states': len(out.hidden_states), 'has graph': loss.requires_grad,
    'training': [n for n, m in model.named_modules() if m.training],
    'frozen': [n for n, p in model.named_parameters() if not p.requires_grad],
    'gradients': [n for n, p in model.named_parameters() if p.grad is not None],
    'modules': [(n, type(m).__name__) for n, m in model.named_modules()],
    'places': {(str(p.device), str(p.dtype)) for p in model.parameters()},
    'default dtype': str(torch.get_default_dtype()), 'grad mode': torch.is_grad_enabled(),
    'padding side': tokenizer.padding_side, 'pad token': tokenizer.pad_token, 'template': tokenizer.chat_template,
    'config': model.config.to_dict(), 'generation config': model.generation_config.to_dict(),
    'tied': model.lm_head.weight is model.transformer.wte.weight,
}
del out, loss
"""
BLOCK = "block = model.transformer.h[0]\n"
HOOK = "def hook(*args): pass\n"
RESTORED = {
    "forward hook": (BLOCK + HOOK + "block.register_forward_hook(hook)", "the call left 1 hook on the model"),
    "hooks": (
        BLOCK
        + HOOK
        + "block.register_forward_pre_hook(hook, with_kwargs=True)\nblock.register_full_backward_hook(hook)\n"
        + "block.mlp.register_forward_hook(lambda m, a, o: o * 0, always_call=True)",
        "the call left 3 hooks on the model",
    ),
    "forward of a module": (BLOCK + "block.forward = lambda x, *a, **k: x", "`forward` that the call had patched"),
    "forward of a class": (
        BLOCK + "type(block.mlp).forward = lambda self, x: x * 0",
        "`forward` that the call had patched",
    ),
    "all hooks removed": (
        "from collections import OrderedDict\nfor m in model.modules(): m._forward_hooks = OrderedDict()",
        "",
    ),
    "train mode": ("model.train()", "train/eval mode was set back"),
    "train mode of a part": (BLOCK + "block.attn.train()", "train/eval mode was set back"),
    "requires_grad": ("model.requires_grad_(False)", "requires_grad of the weights was set back"),
    "gradients": (STATE + "model(ids, labels=ids).loss.backward()", "gradients were freed"),
    "grad mode": ("import torch\ntorch.set_grad_enabled(False)", "gradients were switched on again"),
    "default dtype": (
        "import torch\ntorch.set_default_dtype(torch.float64)",
        "default dtype was set back to torch.float32",
    ),
    "module replaced": (BLOCK + "from torch import nn\nblock.mlp = nn.Identity()", "replaced were put back"),
    "module appended": ("from torch import nn\nmodel.transformer.h.append(nn.Identity())", "replaced were put back"),
    "module removed": ("del model.transformer.h[-1]", "replaced were put back"),
    "parameter replaced": (
        "import torch\nmodel.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))",
        "replaced were put back",
    ),
    "meta device": ("model.to('meta')", "replaced were put back"),
    "config": ("model.config.use_cache = False\nmodel.config.new = 1", "GPT2Config.new, use_cache was set back"),
    "generation config": ("model.generation_config.max_length = 3", "GenerationConfig.max_length was set back"),
    "padding side": (
        "tokenizer.padding_side = {'left': 'right', 'right': 'left'}[tokenizer.padding_side]",
        "tokenizer.padding_side was set back to",
    ),
    "chat template": ("tokenizer.chat_template = '{{ 1 }}'", "tokenizer.chat_template was set back"),
}
DAMAGE = {
    "through .data": "model.transformer.wpe.weight.data.mul_(0)",
    "in place": "import torch\nwith torch.no_grad(): model.transformer.h[1].mlp.c_fc.weight[3] += 1",
    "through numpy": "model.transformer.ln_f.weight.detach().numpy()[:] = 0.5",
    "through a helper": "import torch\ntorch.nn.init.constant_(model.transformer.h[0].ln_1.bias, 0.1)",
    "slowly, unseen": "import time\nw = getattr(model.transformer.ln_f.bias, 'da' + 'ta')\nw += 1\ntime.sleep(0.05)",
    "load_state_dict": "model.load_state_dict({n: p * 1.01 for n, p in model.state_dict().items()})",
    "dtype": "model.to(dtype=__import__('torch').float64)",
}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with sessions() as connect:
        session = connect(WorkerSpec(model_name=DEMO, attn_implementation="eager"))
        yield session
        session.stop()


def state_of(session: Session) -> dict[str, object]:
    answer = run_cell(session, STATE, head={"want": ["state"]})
    assert answer.notes == ""
    state: dict[str, object] = answer["state"]
    state["logits"] = state["logits"].tolist()  # type: ignore[attr-defined]
    return state


@pytest.mark.parametrize("kind", RESTORED)
def test_what_can_be_restored_is_and_the_cell_says_so(kind: str, session: Session) -> None:
    body, note = RESTORED[kind]
    before = state_of(session)
    answer = run_cell(session, f"def call():\n{indent(body, '    ')}\ncall()\ndel call")
    assert answer.error is None
    assert note in answer.notes
    assert len(answer.notes.splitlines()) == (note != "")
    assert state_of(session) == before


@pytest.mark.parametrize("end", ["1 / 0", "print('ready', flush=True)\nwhile True: pass"])
def test_a_call_that_ends_badly_is_cleaned_up_too(end: str, session: Session) -> None:
    before = state_of(session)
    body = BLOCK + HOOK + "block.register_forward_hook(hook)\nmodel.train()\n" + end
    answer = run_cell(session, body, at={"ready": press_stop})
    assert answer.error is not None
    assert "1 hook" in answer.notes
    assert "train/eval" in answer.notes
    assert state_of(session) == before


def test_a_call_that_cleans_up_itself_is_left_alone(session: Session) -> None:
    body = f"""{BLOCK}import torch
seen = []
handle = block.register_forward_hook(lambda *a: seen.append(1))
weight = model.transformer.ln_f.weight
kept = weight.detach().clone()
with torch.no_grad():
    weight.mul_(0)
    model(torch.tensor([[1, 2]]))
    weight.copy_(kept)
handle.remove()
n = len(seen)
del weight, handle, kept, seen, block"""
    answer = run_cell(session, body)
    assert (answer["n"], answer.notes) == (1, "")


def test_the_hooks_that_transformers_installs_for_itself_stay(session: Session) -> None:
    body = "import torch\nids = torch.tensor([[1, 2, 3]])\n"
    body += "out = model(ids, output_hidden_states=True, output_attentions=True)\n"
    body += "v = (len(out.hidden_states), len(out.attentions), model.config.n_layer)\ndel out"
    leak = BLOCK + HOOK + "block.register_forward_hook(hook)"
    for _ in range(3):
        hidden, attentions, n_layers = run_cell(session, body)["v"]
        assert (hidden, attentions) == (n_layers + 1, n_layers)
        run_cell(session, leak)


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_cannot_be_restored_is_reported_with_the_cure(kind: str, session: Session) -> None:
    before = state_of(session)
    n_before = len(session.ask({"verb": "hello"})["damage"])
    answer = run_cell(session, DAMAGE[kind])
    assert answer.error is None
    assert "the call moved" in answer.notes if kind == "dtype" else "the call changed" in answer.notes
    assert "`%remote restart` loads the model anew" in answer.notes
    damage = session.ask({"verb": "hello"})["damage"]
    assert len(damage) == n_before + 1
    assert damage[-1] in answer.notes
    after = state_of(session)  # it is told once
    assert after != before


def test_a_function_that_hides_its_way_to_the_model_is_told_of_with_the_next_call(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its code never names `model`, so it may return before the model is checked; the damage is undone all the same."""

    def leak(*_: object) -> None:
        import gc

        from transformers import GPT2LMHeadModel

        loaded = next(o for o in gc.get_objects() if isinstance(o, GPT2LMHeadModel))
        loaded.register_forward_hook(lambda *_: None)

    def innocent(left: object, right: object) -> None:
        return leak()

    def hooks(model: Any, tokenizer: object) -> int:
        return len(model._forward_hooks)

    with InterpClient() as client:
        before = client.run(hooks)
        client.run(innocent)
        assert client.run(hooks) == before
    assert "left 1 hook on the model: removed" in capsys.readouterr().err


def test_an_uncounted_write_by_a_function_that_hides_its_way_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    def innocent(left: object, right: object) -> None:
        import gc

        from transformers import GPT2LMHeadModel

        loaded = next(o for o in gc.get_objects() if isinstance(o, GPT2LMHeadModel))
        loaded.transformer.ln_f.bias.data.add_(1)

    client = InterpClient(dtype="bfloat16")  # a worker of its own, since its model is damaged
    client.run(innocent)
    client.run(lambda model, tokenizer: model.dtype)
    client.stop()
    assert "changed 1 weight of the model (transformer.ln_f.bias)" in capsys.readouterr().err
