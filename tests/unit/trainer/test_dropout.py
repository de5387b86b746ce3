"""Cheap LoRA layers compute what PEFT's do."""

import pytest
import torch

from finetune_trainer.methods.dropout import Dropout, lighten

from .test_attention import small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_dropped_as_often_as_asked_and_keep_their_mean(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = torch.ones(1001, 333, dtype=dtype, requires_grad=True)
    result = Dropout(0.05)(inputs).detach()
    assert result.dtype == dtype
    assert float((result == 0).float().mean()) == pytest.approx(0.05, abs=2e-3)
    assert float(result.float().mean()) == pytest.approx(1, abs=5e-3)
    columns = (result == 0).float().mean(0)  # four neighbours share one random number: each is dropped as often
    assert float(columns.min()) > 0.01 and float(columns.max()) < 0.1


def test_the_gradient_is_dropped_where_the_input_was() -> None:
    inputs = torch.randn(64, 7, requires_grad=True)
    result = Dropout(0.5)(inputs)
    result.sum().backward()
    assert inputs.grad is not None
    assert torch.equal(inputs.grad * inputs, result)


def test_the_same_seed_drops_the_same_inputs_and_evaluation_drops_none() -> None:
    layer, inputs = Dropout(0.3), torch.randn(50, 50)
    torch.manual_seed(1)
    first = layer(inputs)
    torch.manual_seed(1)
    assert torch.equal(layer(inputs), first)
    assert torch.equal(layer.eval()(inputs), inputs)


def test_a_lightened_model_has_pefts_outputs_and_gradients() -> None:
    from peft import LoraConfig, get_peft_model

    def outcome(light: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(small("Llama").to(torch.bfloat16), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if light:
            lighten(model)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=torch.arange(12)[None]).logits
        logits.float().square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        with torch.no_grad():
            assert model(input_ids=torch.arange(12)[None]).logits.dtype == torch.bfloat16  # without autocast too
        return logits.detach().float(), gradient

    (logits, gradient), (light_logits, light_gradient) = outcome(False), outcome(True)
    assert torch.equal(logits, light_logits)
    assert torch.equal(gradient, light_gradient)


def test_variants_keep_what_they_compute_with() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, lora_dropout=0.1, task_type="CAUSAL_LM")
    model = get_peft_model(small("Llama"), config)
    lighten(model)
    assert not [module for module in model.modules() if isinstance(module, Dropout)]
