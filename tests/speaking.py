"""A small causal language model, whose tokens are bytes, as a folder of transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

END = "</s>"


def write_language_model(
    folder: Path, texts: Sequence[str] = (), seed: int = 0, width: int = 32, longest: int = 128
) -> Path:
    """Write an OPT of two blocks that reads `longest` tokens, and return the folder.

    It has learned to say `texts`, if there are any, behind three tokens of noise.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate([END, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    config = OPTConfig(
        vocab_size=1 + len(letters), hidden_size=width, word_embed_proj_dim=width, num_hidden_layers=2,
        ffn_dim=2 * width, num_attention_heads=2, max_position_embeddings=longest,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
        init_std=0.02 if texts else 0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OPTForCausalLM(config)
        optimizer, words = torch.optim.AdamW(model.parameters(), 3e-3), model.get_input_embeddings()
        rows = [torch.tensor([*tokenizer.encode(text).ids, 0]) for text in texts]
        for _ in range(300 if texts else 0):
            chosen = [rows[place] for place in torch.randint(len(rows), (16,)).tolist()]
            ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-100)
            noise = torch.randn(len(ids), 3, width)
            said = model(inputs_embeds=torch.cat([noise, words(ids[:, :-1].clamp(min=0))], dim=1)).logits[:, 2:]
            loss = torch.nn.functional.cross_entropy(said.flatten(0, 1), ids.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.save_pretrained(folder)
    return folder
