"""A run's tokenizer as Hugging Face's fast one: a tokenizer.json that gives the same ids for any text.

A control token in a text is ordinary text in training, and stays so: tokenizer_config.json sets split_special_tokens.
"""

import json
from collections.abc import Iterator
from itertools import pairwise

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from configs.errors import ConfigError
from data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, TiktokenTokenizer, Tokenizer

SPACE = "\u2581"  # as sentencepiece writes a space
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # its types of pieces
BPE = 2  # its type of model
PROBES = (
    "The class statement: def f(x):\n\treturn  x ** 2  # two\r\n\n\n\n    'tis   it's I'LL\t\t\n \n",
    "Größe naïve İstanbul ẞ ﬁne e\u0301 — … “quotes” 1234567890 ½ Ⅷ ٣ 東京 日本語のテキスト 한국어 हिन्दी العربية",
    "🙂🙃 👩‍👩‍👧‍👦 🏳️‍🌈 \u2581 a\u2581b \ufeff \u00a0 \u3000 \u200b \x00 \x07 \x1b[0m \x7f \x85 \u2028 \U0010ffff",
    "<|endoftext|> a<|endoftext|>b <unk> <s> </s> <pad> <0x0A> [CLS] <|im_start|>",
)


def fast_tokenizer(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of tokenizer.json and tokenizer_config.json. ConfigError if no fast tokenizer is the same."""
    convert = {
        SentencePieceTokenizer: from_sentencepiece,
        TiktokenTokenizer: from_tiktoken,
        HuggingFaceTokenizer: from_hugging_face,
    }[type(tokenizer)]
    made = convert(tokenizer)
    check_same(tokenizer, made)
    end = made.id_to_token(tokenizer.end_of_text)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer.json": made.to_str(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}


def check_same(tokenizer: Tokenizer, made: tokenizers.Tokenizer) -> None:
    """Raise a ConfigError if a hard text gets other ids, or if they give another text."""
    made.encode_special_tokens = True
    for text in PROBES:
        ids = tokenizer.encode(text)
        if made.encode(text, add_special_tokens=False).ids != ids:
            raise ConfigError(f"tokenizer: no fast tokenizer gives the same ids as the run's, for example for {text!r}")
        if made.decode(ids, skip_special_tokens=False) != tokenizer.decode(ids):
            raise ConfigError(f"tokenizer: no fast tokenizer decodes as the run's does, for example {text!r}")


def from_hugging_face(tokenizer: HuggingFaceTokenizer) -> tokenizers.Tokenizer:
    """Return the same without what would cut a text, pad it or add tokens to it."""
    tree = json.loads(tokenizer.content)
    kind = (tree.get("post_processor") or {}).get("type")
    kept = tree.get("post_processor") if kind == "ByteLevel" else None  # which only moves offsets
    return tokenizers.Tokenizer.from_str(
        json.dumps(tree | {"truncation": None, "padding": None, "post_processor": kept})
    )


def from_tiktoken(tokenizer: TiktokenTokenizer) -> tokenizers.Tokenizer:
    """Return byte-level BPE whose merges are those by which tiktoken's ranks build each token."""
    encoding = tokenizer.encoding
    ranks, letters = encoding._mergeable_ranks, byte_letters()

    def word(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [(word(left), word(right)) for left, right in merges_of(ranks)]
    vocabulary = {word(token): rank for token, rank in ranks.items()}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(encoding._pat_str), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    return with_special_tokens(made, {rank: token for token, rank in encoding._special_tokens.items()})


def with_special_tokens(made: tokenizers.Tokenizer, special: dict[int, str]) -> tokenizers.Tokenizer:
    """Return the tokenizer with special tokens at these ids, which need not follow the vocabulary without a gap."""
    tree = json.loads(made.to_str())
    same = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree["added_tokens"] = [{"id": number, "content": text} | same for number, text in sorted(special.items())]
    return tokenizers.Tokenizer.from_str(json.dumps(tree))


def byte_letters() -> list[str]:
    """Return the letter that stands for each byte in byte-level vocabularies, as GPT-2's has it.

    Printable ones of Latin-1 stand for themselves, the others are numbered from U+0100 on.
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (number for number in range(256) if number not in set(shown))
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def merges_of(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the two tokens of which each token is made, in the order of their ranks: what lower ranks make of it."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            least = min(joined)
            if least >= rank:
                break
            place = joined.index(least)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def from_sentencepiece(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """Return BPE over whole texts. Its vocabulary has real spaces, so that U+2581 in a text is bytes, as in training.

    ConfigError for another kind of model, or one that changes its text first.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.content)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != BPE:
        raise ConfigError("tokenizer: only sentencepiece models of type bpe have a fast tokenizer with the same ids")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise ConfigError("tokenizer: its sentencepiece model normalises text, which no fast tokenizer does alike")
    pieces = [piece.piece.replace(SPACE, " ") for piece in proto.pieces]
    normal, control, given = (
        [number for number, piece in enumerate(proto.pieces) if piece.type == kind]
        for kind in (NORMAL, CONTROL, USER_DEFINED)
    )
    by_score = sorted(normal, key=lambda number: -proto.pieces[number].score)
    order = {pieces[number]: place for place, number in enumerate(by_score)}
    merges = sorted(
        (order[piece], cut, piece[:cut], piece[cut:])
        for piece in order
        for cut in range(1, len(piece))
        if piece[:cut] in order and piece[cut:] in order
    )
    made = tokenizers.Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            [(left, right) for *_, left, right in merges],
            unk_token=pieces[trainer.unk_id],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    if normalizer.add_dummy_prefix:
        made.normalizer = normalizers.Prepend(" ")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.add_tokens([AddedToken(pieces[i], normalized=False, special=False) for i in given])
    made.add_special_tokens([AddedToken(pieces[i], normalized=False) for i in control])
    return made
