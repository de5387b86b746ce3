"""The finetune-operator: FineTune and AdapterDeployment objects become Jobs, Deployments and verified adapters."""
