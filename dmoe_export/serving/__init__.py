"""An OpenAI-compatible server: an application over one engine per bundle, whose batch requests join at any step."""
