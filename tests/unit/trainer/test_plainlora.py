"""What was trained in another form is plain LoRA in the bucket: the same update, at a rank that servers know."""

import pytest
import torch

from finetune_trainer.methods.plainlora import without_singular_values, without_start


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_took_its_start_out_of_the_base_becomes_a_plain_lora(rslora: bool) -> None:
    torch.manual_seed(0)
    r, alpha = 4, 8
    start = {"x.lora_A.default.weight": torch.randn(r, 10), "x.lora_B.default.weight": torch.randn(12, r)}
    end = {"x.lora_A.weight": torch.randn(r, 10), "x.lora_B.weight": torch.randn(12, r)}
    weights, config = without_start(end, start, {"r": r, "lora_alpha": alpha, "use_rslora": rslora})

    def update(a: torch.Tensor, b: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
        return scale / (rank**0.5 if rslora else rank) * b @ a

    trained = update(end["x.lora_A.weight"], end["x.lora_B.weight"], r, alpha)
    started = update(start["x.lora_A.default.weight"], start["x.lora_B.default.weight"], r, alpha)
    plain = update(weights["x.lora_A.weight"], weights["x.lora_B.weight"], config["r"], config["lora_alpha"])
    assert torch.allclose(plain, trained - started, atol=1e-4)


def test_patterns_stay_what_they_were_beside_a_start() -> None:
    config = {"r": 4, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {"q": 2}, "alpha_pattern": {"v": 3}}
    _, plain = without_start({}, {}, config)
    assert (plain["r"], plain["lora_alpha"]) == (8, 16)
    assert (plain["rank_pattern"], plain["alpha_pattern"]) == ({"q": 4}, {"v": 6})


def test_singular_values_are_folded_in_and_ranks_made_equal() -> None:
    from peft import AdaLoraConfig, get_peft_model

    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({"one": torch.nn.Linear(10, 12), "two": torch.nn.Linear(12, 7)})
    model = get_peft_model(
        torch.nn.Sequential(layers),  # type: ignore[arg-type]
        AdaLoraConfig(target_modules=["one", "two"], init_r=5, target_r=2, total_step=10, lora_alpha=16),
    )
    for name, kept in (("one", [0, 2, 4]), ("two", [])):
        model.base_model.model[0][name].lora_E["default"].data[kept] = torch.randn(len(kept), 1)
    weights, config = without_singular_values(model)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 3, "LORA")
    for name in ("one", "two"):
        up, down = (weights[f"base_model.model.0.{name}.lora_{half}.weight"] for half in "BA")
        assert down.shape[0] == up.shape[1] == 3
        assert torch.allclose(up @ down, model.base_model.model[0][name].get_delta_weight("default"), atol=1e-6)
