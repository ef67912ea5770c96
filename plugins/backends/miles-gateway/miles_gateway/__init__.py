"""Sessions of OpenAI's chat API in front of a run's engines: what an agent says there is recorded and trained on."""
