"""tokenizer.json, Hugging Face's form of a tokenizer, built from a SentencePiece BPE model with byte fallback.

Without it transformers 5 makes its own guess from tokenizer.model, with other ids.
"""

import json
from pathlib import Path

import sentencepiece

SPACE = "\u2581"  # how SentencePiece writes a space


def build(model: bytes) -> dict:
    """Builds the content of tokenizer.json.

    Raises:
        ValueError: the model does something that this format cannot say, or that we do not know how to.
    """
    sp = sentencepiece.SentencePieceProcessor()
    sp.LoadFromSerializedProto(model)
    ids = range(sp.GetPieceSize())
    pieces = [sp.IdToPiece(i) for i in ids]
    _check(sp, pieces)
    prefix = sp.EncodeAsPieces("a")[0].startswith(SPACE)
    special = [i for i in ids if sp.IsControl(i) or sp.IsUnknown(i)]
    bos, unk = pieces[sp.bos_id()], pieces[sp.unk_id()]
    space = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    back = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    single, other = ([{"Sequence": {"id": part, "type_id": k}}] for k, part in enumerate("AB"))
    again = {"SpecialToken": {"id": bos, "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, pieces[i]) for i in special],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}] * prefix + space},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, *single],
            "pair": [first, *single, again, *other],
            "special_tokens": {bos: {"id": bos, "ids": [sp.bos_id()], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": back + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges({pieces[i]: sp.GetScore(i) for i in _normal(sp)}),
        },
    }


def _check(sp, pieces: list[str]) -> None:
    """Refuses what would come out different."""
    if len(set(pieces)) != len(pieces):
        raise ValueError("two pieces are alike")
    if sum(sp.IsByte(i) for i in range(len(pieces))) != 256:
        raise ValueError("the model has no byte fallback")
    if any(sp.IsUnused(i) for i in range(len(pieces))):
        raise ValueError("the model has unused pieces")
    probe = "x  y \ufb01\u2460\u212b\uff21 z "
    if sp.Normalize(probe).replace(SPACE, " ").removeprefix(" ") != probe:
        raise ValueError("the model normalises its text")
    # BPE's scores are ranks, 0, -1, ...; pieces of spaces alone may all share the last one (Mixtral's do).
    scores = {pieces[i]: sp.GetScore(i) for i in _normal(sp)}
    words = [score for piece, score in scores.items() if piece.strip(SPACE)]
    if len(set(words)) != len(words) or any(score > 0 or score != int(score) for score in scores.values()):
        raise ValueError("its scores are not the ranks of a BPE model")


def _normal(sp) -> list[int]:
    """Ids of pieces that text is made of, bytes aside."""
    return [i for i in range(sp.GetPieceSize()) if not (sp.IsControl(i) or sp.IsUnknown(i) or sp.IsByte(i))]


def _merges(score: dict[str, float]) -> list[list[str]]:
    """Every way to put a piece together from two others, the better piece first.

    SentencePiece takes equals (runs of spaces) from the left, so that the leftmost run grows first: longer left
    halves come first here.
    """
    merges = []
    for piece in score:
        ways = [[piece[:k], piece[k:]] for k in range(1, len(piece)) if piece[:k] in score and piece[k:] in score]
        if len(piece) > 1 and not ways:
            raise ValueError(f"the piece {piece!r} cannot be put together from two others")
        merges += ways
    return sorted(merges, key=lambda way: (-score[way[0] + way[1]], -len(way[0])))


def _added(i: int, piece: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": piece} | flags | {"special": True}


def write_tokenizer(folder: Path, model: bytes, max_seq_len: int) -> str:
    """Writes tokenizer.json and tokenizer_config.json.

    Returns:
        why not, where the model cannot be said in that format; then nothing is written.
    """
    try:
        content = build(model)
    except ValueError as error:
        return str(error)
    sp = sentencepiece.SentencePieceProcessor()
    sp.LoadFromSerializedProto(model)
    names = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id()}
    config = {
        # The plain class: those with a model's name rebuild the tokenizer by rules of their own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        **{key: sp.IdToPiece(i) for key, i in names.items()},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return ""
