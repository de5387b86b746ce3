"""Tasks of the lm-evaluation-harness, asked of base model and adapter. lm-eval is imported where a FineTune asks for one."""
