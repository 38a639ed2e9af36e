"""The routes that clients of OpenAI know: from a request to its generations and back to JSON or a stream."""
