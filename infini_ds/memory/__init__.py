"""The compressive memory: the state that is handed on along a document, and how it changes."""
