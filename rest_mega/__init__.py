"""rest_mega: ResT reinforcement learning for tool-using LLMs on Megatron-Core."""

__version__ = "0.1.0"
