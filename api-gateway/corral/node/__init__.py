"""The embedded node: Ollama's API over llama.cpp, or over a simulation of it."""
