"""Tokenizers: Mixtral's own SentencePiece model, any other SentencePiece model, one trained on the spot, or bytes.

A tokenizer never adds BOS or EOS by itself, and has no padding id: padding is told by length, never by id.
"""

import functools
import hashlib
import importlib.util
import io
import json
import logging
import os
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data.remote_cache import build_once, place
from mixtral_jax.data.text import documents, fingerprint, is_heldout

logger = logging.getLogger(__name__)

MODEL_FILE, BYTES_FILE = "tokenizer.model", "tokenizer.json"
SAMPLE_CHARACTERS, CHUNK_CHARACTERS = 16_000_000, 1000  # SentencePiece skips a sentence of more than 4192 bytes
SPACE_SYMBOL = "\u2581"  # SentencePiece writes a space as this character, and reads this character as a space


class Tokenizer(Protocol):
    """What the package asks of a tokenizer."""

    name: str
    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str
    fallback_ids: Sequence[
        int
    ]  # the unknown piece and those of single bytes: what is spelled for want of a better piece

    def encode(self, text: str) -> list[int]: ...
    def encode_array(self, text: str) -> np.ndarray: ...
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def continuation(self, context_ids: Sequence[int], new_ids: Sequence[int]) -> str: ...
    def save(self, folder: str | Path) -> None: ...


def load_tokenizer(spec: str, cache_dir: str, heldout_fraction: float = 0.02) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        spec: `mistral-v1`, `bytes`, `stdlib:SIZE` (trained once, then cached), the path of a SentencePiece model, or
            a folder written by `save`.
        cache_dir: where `stdlib:SIZE` is kept, perhaps an object store; `~` is the home directory.
        heldout_fraction: data.heldout_fraction; `stdlib:SIZE` is trained on the other documents only.

    Raises:
        UserError: the spec means nothing, or the file is missing or damaged.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec == "mistral-v1":
        return _load_model(_mistral_v1(), spec)
    if spec.startswith("stdlib:"):
        return _stdlib_tokenizer(spec, cache_dir, heldout_fraction)
    path = Path(spec).expanduser()
    if path.is_dir():
        files = [path / name for name in (MODEL_FILE, BYTES_FILE) if (path / name).is_file()]
        if not files:
            raise UserError(
                f"data.tokenizer: {path} holds neither {MODEL_FILE} nor {BYTES_FILE}; give the path of a SentencePiece model"
            )
        path = files[0]
    if not path.is_file():
        raise UserError(
            f"data.tokenizer={spec!r} is no file or folder; use mistral-v1, bytes, stdlib:SIZE or the path of a SentencePiece model"
        )
    return _load_bytes(path) if path.suffix == ".json" else _load_model(path, path.name)


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then BOS and EOS: lossless on any text, and in no need of a file."""

    name, vocab_size, bos_id, eos_id = "bytes", 258, 256, 257
    fingerprint = hashlib.sha256(b"bytes: ids 0..255, bos 256, eos 257").hexdigest()
    fallback_ids = ()

    def encode(self, text: str) -> list[int]:
        return list(_characters(text).encode())

    def encode_array(self, text: str) -> np.ndarray:
        """As encode, without an object for each id: integers [n]."""
        return np.frombuffer(_characters(text).encode(), np.uint8)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text; BOS and EOS are dropped, invalid UTF-8 and ids outside the vocabulary become U+FFFD."""
        kept = (int(i) for i in ids if i not in (self.bos_id, self.eos_id))
        return bytes(i if 0 <= i < 256 else 0xFF for i in kept).decode(errors="replace")

    def continuation(self, context_ids: Sequence[int], new_ids: Sequence[int]) -> str:
        return _continuation(self.decode, context_ids, new_ids)

    def save(self, folder: str | Path) -> None:
        _write(Path(folder, BYTES_FILE), json.dumps({"type": "bytes"}).encode())


class SentencePieceTokenizer:
    """A SentencePiece model. Texts are encoded as plain text: a literal "<s>" is never BOS.

    Raises:
        UserError: the bytes are no SentencePiece model, or one without BOS and EOS.
    """

    def __init__(self, model: bytes, name: str):
        self._model, self._processor = model, sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"{name} is not a SentencePiece model, or is damaged; fetch or train it again") from error
        self.name, self.fingerprint = name, hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.GetPieceSize()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        single_bytes = (i for i in range(self.vocab_size) if self._processor.IsByte(i))
        self.fallback_ids = (self._processor.unk_id(), *single_bytes)
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(
                f"{name} has no BOS or no EOS piece; train it with bos_id and eos_id, as `python -m mixtral_jax.data tokenizer` does"
            )
        # A literal U+2581 would come back as a space. Its three bytes do not, where the model has bytes. A model with
        # a dummy prefix (Mixtral's) is left alone: pieces of text would each get the prefix, and ids must be Mistral's.
        symbol_bytes = [f"<0x{byte:02X}>" for byte in SPACE_SYMBOL.encode()]
        self._symbol_ids = [self._processor.PieceToId(piece) for piece in symbol_bytes]
        has_bytes = all(self._processor.IsByte(i) for i in self._symbol_ids)
        self._escapes = has_bytes and not self._processor.EncodeAsPieces("a")[0].startswith(SPACE_SYMBOL)

    def __reduce__(self):
        # To other processes travel the model's bytes.
        return type(self), (self._model, self.name)

    def encode(self, text: str) -> list[int]:
        text = _characters(text)
        if not self._escapes or SPACE_SYMBOL not in text:
            return self._processor.encode(text)
        first, *others = (self._processor.encode(part) for part in text.split(SPACE_SYMBOL))
        return first + [i for part in others for i in self._symbol_ids + part]

    def encode_array(self, text: str) -> np.ndarray:
        """As encode, without an object for each id: int32 [n]."""
        if self._escapes and SPACE_SYMBOL in text:
            return np.array(self.encode(text), np.int32)
        return self._processor.encode(_characters(text), return_type="numpy")

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns each text's ids, the texts spread over all cores."""
        if any(SPACE_SYMBOL in text for text in texts):
            return [self.encode(text) for text in texts]
        return self._processor.encode([_characters(text) for text in texts], num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text; BOS and EOS are dropped, ids outside the vocabulary are shown as the unknown piece."""
        unknown = self._processor.unk_id()
        return self._processor.decode([int(i) if 0 <= i < self.vocab_size else unknown for i in ids])

    def continuation(self, context_ids: Sequence[int], new_ids: Sequence[int]) -> str:
        return _continuation(self.decode, context_ids, new_ids)

    def is_control(self, piece: str) -> bool:
        """Whether this is a control piece, which no text encodes to: `[INST]` is one from Mistral's v2 tokenizer on."""
        return self._processor.IsControl(self._processor.PieceToId(piece))

    def piece_id(self, piece: str) -> int:
        """The id of a piece, that of the unknown piece if there is none."""
        return self._processor.PieceToId(piece)

    def save(self, folder: str | Path) -> None:
        _write(Path(folder, MODEL_FILE), self._model)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a lossless BPE model (byte fallback, no normalisation, whitespace kept) with unk 0, BOS 1, EOS 2.

    Args:
        texts: training texts; of a large corpus a sample of 8 to 16 million characters is used.
        vocab_size: pieces, of which 259 are special or bytes.

    Returns:
        The model's bytes, the same for the same texts.

    Raises:
        UserError: the texts do not yield that many pieces, or more single characters than that.
    """
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(texts)),
            model_writer=out,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9999,  # rarer characters are spelled in bytes
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation in one piece
            shuffle_input_sentence=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"a SentencePiece vocabulary of {vocab_size} does not fit this text: {error}; choose another size or more text"
        ) from error
    return out.getvalue()


def _sample(texts: Iterable[str]) -> list[str]:
    """Cuts texts into chunks and keeps those of small hash: a bounded share that does not depend on chance or order."""
    kept: list[tuple[int, str]] = []
    size, threshold = 0, 2**32
    for text in texts:
        # SentencePiece skips sentences with a tab, its separator, or a NUL; both are spelled as bytes anyway.
        text = text.replace("\t", "\n").replace("\0", "\n")
        for at in range(0, len(text), CHUNK_CHARACTERS):
            chunk = text[at : at + CHUNK_CHARACTERS]
            mark = zlib.crc32(chunk.encode())
            if mark < threshold:
                kept.append((mark, chunk))
                size += len(chunk)
            while size > SAMPLE_CHARACTERS:
                threshold //= 2
                kept = [pair for pair in kept if pair[0] < threshold]
                size = sum(len(chunk) for _, chunk in kept)
    return [chunk for _, chunk in kept]


def _stdlib_tokenizer(spec: str, cache_dir: str, heldout_fraction: float) -> SentencePieceTokenizer:
    size_text = spec.removeprefix("stdlib:")
    if not size_text.isdecimal():
        raise UserError(f"data.tokenizer={spec!r}; write the vocabulary's size after the colon, as in stdlib:4096")
    size = int(size_text)
    source = SourceConfig("stdlib", "", "text", "stdlib", 1.0)

    def build(folder: Path):
        logger.info("training the tokenizer %s on the standard library's source (once)", spec)
        start = time.perf_counter()
        texts = (document.text for document in documents(source))
        model = train_sentencepiece((text for text in texts if not is_heldout(text, heldout_fraction)), size)
        _write(folder / MODEL_FILE, model)
        logger.info("trained %s in %.1f s", spec, time.perf_counter() - start)

    def open_(folder: Path) -> SentencePieceTokenizer:
        tokenizer = _load_model(folder / MODEL_FILE, spec)
        if tokenizer.vocab_size != size:
            raise UserError(f"{folder / MODEL_FILE} has {tokenizer.vocab_size} pieces instead of {size}")
        return tokenizer

    name = f"stdlib-{size}-{heldout_fraction:g}-{fingerprint(source)[:16]}"
    return build_once(place(cache_dir, "tokenizers", name), open_, build)


@functools.cache
def _mistral_v1() -> Path:
    # Found without importing the package, which takes seconds.
    found = importlib.util.find_spec("mistral_common")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder, "data", "tokenizer.model.v1")
        if path.is_file():
            return path
    raise UserError(
        "data.tokenizer=mistral-v1 needs the package mistral-common, which holds the model; pip install mistral-common"
    )


def _load_model(path: Path, name: str) -> SentencePieceTokenizer:
    try:
        return SentencePieceTokenizer(path.read_bytes(), name)
    except (UserError, OSError) as error:
        raise UserError(f"data.tokenizer: {path}: {error}") from error


def _load_bytes(path: Path) -> ByteTokenizer:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"data.tokenizer: {path} is not JSON ({error}); save the tokenizer again") from error
    if content != {"type": "bytes"}:
        raise UserError(
            f'data.tokenizer: {path} is not {{"type": "bytes"}}; other tokenizers are read from a SentencePiece {MODEL_FILE}'
        )
    return ByteTokenizer()


def _continuation(decode, context_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """Decodes new ids as they read after their context; alone, SentencePiece would drop one leading space."""
    before = decode(context_ids)
    whole = decode([*context_ids, *new_ids])
    # A context that ends within a character changes its last letters (U+FFFD) when the rest comes: cut where they part.
    shorter = min(len(before), len(whole))
    return whole[next((i for i in range(shorter) if before[i] != whole[i]), shorter) :]


def _characters(text: str) -> str:
    """Replaces lone surrogates, which no UTF-8 can spell, by U+FFFD; argv and JSON can smuggle them in."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
