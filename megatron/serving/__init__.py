"""A trained model behind HTTP: Megatron-LM's `PUT /api`, and completions in OpenAI's form."""
