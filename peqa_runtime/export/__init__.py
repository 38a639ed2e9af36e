"""A base with a scale set merged into it, and sets, in the formats of others: Hugging Face folders, GPTQ, (IA)3."""
