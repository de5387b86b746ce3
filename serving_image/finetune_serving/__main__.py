"""`python -m finetune_serving` is the agent: the image's entry point."""

from finetune_serving.agent import main

if __name__ == "__main__":
    main()
