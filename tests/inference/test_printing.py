"""What is printed while texts grow is what is printed at the end."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from cherry_megatron.inference.printing import Printer
from cherry_megatron.inference.prompts import Prompts, visible

# Bytes as tokens, as a byte-level tokenizer has them: a Korean syllable takes three.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {byte: chr(byte) for byte in BYTES} | {
    byte: chr(256 + place) for place, byte in enumerate(b for b in range(256) if b not in BYTES)
}
END = 256
tokenizer = Tokenizer(models.BPE({**{LETTERS[byte]: byte for byte in range(256)}, "<end>": END}, []))
tokenizer.decoder = decoders.ByteLevel()


def prompts(count):
    return Prompts([f"prompt {number}" for number in range(count)], [[1]] * count, END, tokenizer)


texts = st.lists(
    st.one_of(st.text(alphabet="가나\n\x1b é", max_size=6).map(lambda t: t.encode()), st.binary(max_size=6)),
    min_size=1,
    max_size=3,
)


@given(texts, st.data())
def test_the_whole_does_not_depend_on_when_it_is_told(texts, data):
    tokens = [[*text, END] if data.draw(st.booleans()) else list(text) for text in texts]
    told = [0] * len(texts)
    pieces: list[str] = []
    printer = Printer(prompts(len(texts)), pieces.append)
    for number in data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=20)):
        if told[number] < len(tokens[number]):
            told[number] += data.draw(st.integers(1, len(tokens[number]) - told[number]))
            printer.tell(number, tokens[number][: told[number]], told[number] == len(tokens[number]))
    for number, whole in enumerate(tokens):
        printer.tell(number, whole, over=True)
    expected = [text.decode(errors="replace") for text in texts]
    assert "".join(pieces) == "".join(
        f"> prompt {number}\n{visible(text)}\n\n" for number, text in enumerate(expected)
    )


def test_pieces_by_hand():
    pieces: list[str] = []
    printer = Printer(prompts(2), pieces.append)
    first, second = [*"가나".encode(), END], list(b"ab")
    printer.tell(1, second[:1], over=False)
    assert pieces == [], "the first text comes first"
    printer.tell(0, first[:4], over=False)
    assert "".join(pieces) == "> prompt 0\n가", "half a character waits"
    printer.tell(0, first, over=True)
    assert "".join(pieces) == "> prompt 0\n가나\n\n> prompt 1\na"
    printer.tell(1, second, over=True)
    assert pieces[-1] == "\n\n"
