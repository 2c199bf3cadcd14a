"""Points: the laws of their arithmetic, ties, buffers, integers, forms of models, and what is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lineament import io
from lineament._base.errors import InputError
from lineament.models import tiny_teacher
from lineament.weights import Point


def weights(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(5, 3, generator=g).to(dtype), "b.bias": torch.randn(7, generator=g).to(dtype)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "tiny"
    tiny_teacher("llama", tie_word_embeddings=True).save_pretrained(out)
    return out


def moved(folder, out, seed=1, scale=0.1):
    """A "fine-tune" of a folder's model: every weight moved at random."""
    point = Point.open(folder)
    g = torch.Generator().manual_seed(seed)
    return (point + Point.open({n: scale * torch.randn(s.shape, generator=g) for n, s in point.specs.items()})).save(
        out
    )


def test_what_cancels_is_gone_to_the_last_bit():
    a, b, c = (Point.open(weights(i, torch.bfloat16)) for i in range(3))
    for expression, expected in [(a + (b - a), b), (a + 0.1 * (b - c) - 0.1 * (b - c), a), (a.interpolate(b, 0.0), a)]:
        assert all(torch.equal(expression[n], expected[n]) for n in expected)
        assert expression.dtype("b.bias") == torch.bfloat16
    assert all(not (a - a)[n].any() for n in a)


def test_arithmetic_equals_plain_tensors_in_float32_rounded_once():
    a, b = weights(0, torch.bfloat16), weights(1, torch.float16)
    point = 0.3 * Point.open(a) - Point.open(b) / 2 + Point.open(a).interpolate(Point.open(b), 0.25)
    for name in a:
        x, y = a[name].double(), b[name].double()
        torch.testing.assert_close(
            point.value(name).double(), 0.3 * x - y / 2 + 0.75 * x + 0.25 * y, rtol=1e-6, atol=1e-6
        )
        assert point.dtype(name) == torch.float32  # what bf16 and fp16 promote to
        assert point.to(torch.float16)[name].dtype == torch.float16


def test_float64_stays_float64():
    a, b = weights(0, torch.float64), weights(1, torch.float64)
    point = Point.open(a) - 0.1 * Point.open(b)
    assert torch.equal(point["a.weight"], a["a.weight"] * 1.0 - 0.1 * b["a.weight"])


def test_geometry_equals_one_long_vector():
    a, b = weights(0), weights(1)
    x, y = (torch.cat([t.double().flatten() for t in w.values()]) for w in (a, b))
    p, q = Point.open(a), Point.open(b)
    assert p.dot(q) == pytest.approx(float(x @ y), rel=1e-12)
    assert p.norm() == pytest.approx(float(x.norm()), rel=1e-12)
    assert p.angle(q) == pytest.approx(math.acos(float(x @ y / x.norm() / y.norm())), rel=1e-12)
    assert p.angle(3 * p) == pytest.approx(0, abs=1e-7)
    assert math.isnan(p.angle(p - p))


def test_blocks_are_scaled_by_the_first_glob_that_fits():
    a = weights(0)
    point = Point.open(a) * {"a.*": 2.0, "*": -1.0}
    assert torch.equal(point["a.weight"], 2 * a["a.weight"])
    assert torch.equal(point["b.bias"], -a["b.bias"])
    with pytest.raises(InputError, match=r"no coefficient for 'b\.bias'"):
        (Point.open(a) * {"a.*": 2.0})["b.bias"]
    with pytest.raises(InputError, match="not a finite number"):
        Point.open(a) * float("nan")


def test_nan_has_no_angle():
    a, b = (Point.open(weights(i)) for i in range(2))
    broken = b.replace({"b.bias": torch.full((7,), float("nan"))})
    assert math.isnan(a.angle(broken))
    assert not a.slerp(broken, 0.5)["b.bias"].isfinite().any()


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.2])
def test_slerp_stays_on_the_arc_and_keeps_the_plane(t):
    a, b = weights(0, torch.float64), weights(1, torch.float64)
    found = Point.open(a).slerp(Point.open(b), t)["a.weight"]
    x, y = a["a.weight"], b["a.weight"]
    angle = torch.arccos((x * y).sum() / x.norm() / y.norm())
    torch.testing.assert_close(found, (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle))
    parallel = Point.open(a).slerp(Point.open(a) * 3, t)["a.weight"]
    torch.testing.assert_close(parallel, (1 + 2 * t) * x)


def test_a_module_keeps_its_ties_and_buffers():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    before = Point.open(model)
    assert before.ties == {"2.weight": "0.weight"}
    with torch.no_grad():
        model[0].weight += 1
        model[1].running_mean += 1
    after = Point.open(model)
    assert (after - before).norm() == pytest.approx(4.0)  # the tied weight once, the buffer not at all
    middle = before.interpolate(after, 0.5)
    assert torch.equal(middle["1.running_mean"], torch.full((4,), 0.5))
    middle.load_into(model)
    assert model[2].weight is model[0].weight
    torch.testing.assert_close(model[2].weight, before["0.weight"] + 0.5)


def test_a_transpose_of_the_same_memory_is_no_tie():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = nn.Parameter(net[0].weight.data.T)
    point = Point.open(net)
    assert not point.ties
    assert torch.equal(point["1.weight"], point["0.weight"].T)


def test_integers_are_carried_and_must_agree():
    a, b = {"n": torch.tensor(3), "w": torch.ones(2)}, {"n": torch.tensor(4), "w": torch.ones(2)}
    assert (Point.open(a) * 0.5)["n"] == 3
    with pytest.raises(InputError, match=r"'n' is torch\.int64 and differs"):
        (Point.open(a) + Point.open(b))["n"]
    settled = Point.open(b).replace({"n": torch.tensor(3)})
    assert (Point.open(a) + settled)["n"] == 3


def test_a_snapshot_does_not_follow_training():
    w = {"w": torch.ones(2)}
    point, live = Point.open(w), Point.open(w, copy=False)
    w["w"] += 1
    assert point["w"].tolist() == [1, 1]
    assert live["w"].tolist() == [2, 2]


def test_a_saved_point_is_what_transformers_opens(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    tuned = Point.open(moved(folder, tmp_path / "tuned"))
    base = Point.open(folder)
    assert base.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    out = (base + 0.5 * (tuned - base)).save(tmp_path / "half", dtype=torch.bfloat16, max_shard_size="20kB")
    assert len(list(out.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    name = "model.layers.1.mlp.up_proj.weight"
    expected = ((base[name].double() + tuned[name].double()) / 2).bfloat16()
    torch.testing.assert_close(model.get_parameter(name).data, expected, rtol=0.01, atol=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loose = AutoModelForCausalLM.from_pretrained(base.untie().save(tmp_path / "loose"))
    assert loose.lm_head.weight is not loose.model.embed_tokens.weight


def test_safetensors_files_and_gguf_are_points(folder):
    file = Point.open(folder / "model.safetensors")
    assert file.folder == folder
    assert torch.equal(file["model.norm.weight"], Point.open(str(folder))["model.norm.weight"])


def adapter(folder, out, **options):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **options})
    model = get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(out)
    return model.merge_and_unload()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 9}}],
)  # fmt: skip
def test_a_merged_adapter_is_what_peft_merges(folder, tmp_path, options):
    expected = Point.open(adapter(folder, tmp_path / "lora", **options))
    base = Point.open(folder)
    merged = Point.open(tmp_path / "lora")
    for name in merged:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-5, atol=1e-5)
    product = Point.open(tmp_path / "lora", lora="product")
    assert 0 < len(product) < len(base)
    assert all(torch.equal((base + product)[n], merged[n]) for n in merged)
    assert all(torch.equal((merged - product)[n], base[n]) for n in base)  # subtracted again, to the bit


def running(folder, out, **options):
    """An adapter with random numbers, saved, and what peft computes with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})).eval()
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora" in name or "modules_to_save" in name:
            nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
    model.save_pretrained(out)
    return model(torch.arange(9)[None]).logits


def logits(folder, point):
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    return point.load_into(own).eval()(torch.arange(9)[None]).logits


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]},
     {"target_modules": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["embed_tokens", "lm_head"]},
     {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
)  # fmt: skip
def test_an_adapter_on_tied_weights_moves_the_side_it_is_on(folder, tmp_path, options):
    expected = running(folder, tmp_path / "lora", **options)
    merged = Point.open(tmp_path / "lora")
    torch.testing.assert_close(logits(folder, merged), expected, rtol=1e-4, atol=1e-4)
    assert not merged.ties
    if "modules_to_save" not in options:
        with pytest.raises(InputError, match=r"one side only; open it as 'merged', or give an untied base"):
            Point.open(tmp_path / "lora", lora="product")
        loose = Point.open(folder).untie()
        product = Point.open(tmp_path / "lora", base=loose, lora="product")
        assert all(torch.equal((loose + product)[n], merged[n]) for n in merged)
        if "lm_head" in options["target_modules"]:
            with pytest.raises(InputError, match=r"lm_head\.weight of .* is tied in"):
                Point.open(folder) + product


def test_an_adapter_that_keeps_weights_tied_stays_tied(folder, tmp_path):
    expected = running(folder, tmp_path / "lora", target_modules=["embed_tokens"], ensure_weight_tying=True)
    merged = Point.open(tmp_path / "lora")
    assert merged.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    torch.testing.assert_close(logits(folder, merged), expected, rtol=1e-4, atol=1e-4)


def test_two_tensors_that_a_folder_holds_are_not_tied_by_its_config(folder, tmp_path):
    """A head trained on its own beside a config that still says it is tied: transformers keeps both, with a warning."""
    from transformers import AutoModelForCausalLM

    tiny_teacher("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    point, model = Point.open(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not point.ties
    assert torch.equal(point["lm_head.weight"], model.lm_head.weight)
    assert not torch.equal(point["lm_head.weight"], point["model.embed_tokens.weight"])
    point.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    table = Point.open(folder)["model.embed_tokens.weight"]
    both = Point.open(folder).untie().replace({"lm_head.weight": table})
    both.save(tmp_path / "twice", config={"tie_word_embeddings": True})
    assert Point.open(tmp_path / "twice").ties == {"lm_head.weight": "model.embed_tokens.weight"}


def test_nothing_is_rounded_on_the_way():
    a, b = (Point.open(weights(i, torch.bfloat16)) for i in range(2))
    third = (a - b) / 3
    renamed, changed = Point.open(third, rename={"a.": "c."}), third.replace({"b.bias": torch.zeros(7)})
    for other in (renamed.value("c.weight"), changed.value("a.weight")):
        assert torch.equal(other, third.value("a.weight"))
    assert changed["a.weight"].dtype == torch.bfloat16


def test_a_folder_and_what_it_says_stay_together(folder, tmp_path):
    loose = Point.open(folder).untie()
    numbers = Point.open({name: loose[name] for name in loose}, copy=False)
    (0.5 * numbers + 0.5 * loose).save(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False


def test_tied_names_take_one_tensor(folder):
    base = Point.open(folder)
    new = torch.ones(base.shape("lm_head.weight"))
    both = base.replace({"lm_head.weight": new, "model.embed_tokens.weight": new.clone()})
    assert both["lm_head.weight"].equal(new)
    with pytest.raises(InputError, match=r"tied to 'model\.embed_tokens\.weight' are given different tensors"):
        base.replace({"lm_head.weight": new, "model.embed_tokens.weight": new + 1})


def test_factors_apart_are_as_stored(folder, tmp_path):
    adapter(folder, tmp_path / "lora")
    factors = Point.open(tmp_path / "lora", lora="factors")
    half = factors.interpolate(factors * 0, 0.5)
    name = next(n for n in factors if "lora_A" in n)
    torch.testing.assert_close(half[name], factors[name] / 2)


def test_a_lora_of_another_base_is_refused(folder, tmp_path):
    adapter(folder, tmp_path / "lora")
    tiny_teacher("llama", hidden_size=36, tie_word_embeddings=True).save_pretrained(tmp_path / "tiny")
    with pytest.raises(InputError, match="LoRA of another base"):
        Point.open(tmp_path / "lora", base=tmp_path / "tiny")
    with pytest.raises(InputError, match="any_base"):
        Point.open(tmp_path / "lora", base={"w": torch.ones(1)})
    with pytest.raises(InputError, match="unknown form of a LoRA 'produkt'"):
        Point.open(tmp_path / "lora", lora="produkt")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(InputError, match="DoRA"):
        Point.open(tmp_path / "lora")
    for field, found in (
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("layer_replication", [[0, 1], [0, 2]]),
    ):
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config | {field: found}))
        with pytest.raises(InputError, match="is no plain LoRA"):
            Point.open(tmp_path / "lora")
    for start in ("pissa_niter_4", "olora", "corda"):
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
        with pytest.raises(InputError, match=rf"starts as {start}, .* path_initial_model_for_weight_conversion"):
            Point.open(tmp_path / "lora")


def test_packed_weights_are_refused_or_unpacked_by_option(tmp_path):
    plain = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    scale = plain.abs().amax(1, keepdim=True) / 400
    packed = {"w.weight": (plain / scale).to(torch.float8_e4m3fn), "w.weight_scale": scale, "n.weight": torch.ones(3)}
    save_file(packed, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"quantised weights .*--dequantise"):
        Point.open(tmp_path)
    point = Point.open(tmp_path, dequantise=True)
    assert list(point) == ["n.weight", "w.weight"]
    torch.testing.assert_close(point["w.weight"], packed["w.weight"].float() * scale)
    blocks = {"w.weight": packed["w.weight"], "w.weight_scale_inv": torch.rand(2, 2)}
    save_file(blocks, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"weight_block_size": [5, 4]}}))
    expected = (
        packed["w.weight"].float()
        * blocks["w.weight_scale_inv"].repeat_interleave(5, 0)[:8].repeat_interleave(4, 1)[:, :6]
    )
    torch.testing.assert_close(Point.open(tmp_path, dequantise=True)["w.weight"], expected)
    save_file({"w.qweight": torch.ones(2, 2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"isn't unpacked here \(w\.qweight\)"):
        Point.open(tmp_path, dequantise=True)


def test_differences_are_named_before_anything_is_read():
    a = Point.open(weights(0))
    with pytest.raises(InputError, match=r"only in a state dict: c\.weight"):
        a + Point.open({**weights(0), "c.weight": torch.ones(1)})
    with pytest.raises(InputError, match=r"differ by the prefix 'module\.'.*rename"):
        a + Point.open({f"module.{n}": x for n, x in weights(1).items()})
    assert (a - Point.open({f"module.{n}": x for n, x in weights(0).items()}, rename={"module.": ""})).norm() == 0
    with pytest.raises(InputError, match="another architecture"):
        a + Point.open({"x": torch.ones(1), "y": torch.ones(1)})
    many = {f"w{i}": torch.ones(2) for i in range(12)}
    with pytest.raises(InputError, match=r"shapes of 12 tensors: .*w9 .* and 2 more"):
        Point.open(many) + Point.open({n: torch.ones(3, 3) for n in many})
    with pytest.raises(InputError, match=r"only the vocabulary differs \(5 and 6 rows\).*tokenizer_source"):
        a + Point.open({**weights(0), "a.weight": torch.ones(6, 3)})


def test_ties_on_one_side_only_are_named(folder):
    base = Point.open(folder)
    with pytest.raises(InputError, match=r"lm_head\.weight is tied in one"):
        base - base.untie()
    assert (base.untie() - base.untie()).norm() == 0


def test_nan_is_named_and_nothing_is_left(tmp_path, folder):
    broken = Point.open(folder).replace({"model.norm.weight": torch.full((24,), float("nan"))})
    with pytest.raises(InputError, match=r"'model\.norm\.weight' .* holds 24 NaN"):
        broken.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_work_is_not_taken_for_the_same(tmp_path, folder):
    partial = io.partial_path(tmp_path / "out")
    (partial / ".plan").mkdir(parents=True)
    (partial / ".plan" / "plan.json").write_text('{"point": "another", "shards": 5000000000}')
    with pytest.raises(InputError, match="left from other work"):
        Point.open(folder).save(tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        Point.open(folder).save(folder)
