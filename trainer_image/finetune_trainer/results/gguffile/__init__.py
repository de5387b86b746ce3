"""A merged model as one GGUF file for llama.cpp: which models can be, how it is written, and that llama.cpp agrees.

ggml's own `gguf` writes the file and knows the tensors' names. What llama.cpp's converter knows beside that is in
architectures.py and vocabulary.py, as tables: the converter is published in no package of its own, and it knows a
tokenizer by a hash of what it makes of one text, so it refuses each tokenizer that has words of one's own.
"""
