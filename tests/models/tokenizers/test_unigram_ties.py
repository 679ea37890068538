"""Which of several segmentations of equal score ChatGLM-6B's tokenizer takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.models.tokenizers.unigram_ties import TieBreaker

# Text → ids of sentencepiece 0.1.99 on the released file; later versions order most of these differently.
RECORDED = {
    ":::": [5, 87, 12],
    ";;;:::": [5, 127927, 12, 87],
    "hello ~~~~~~~": [14833, 5, 127136, 125760],
    "。。。。。。。。。。": [5, 75580, 77036],
    "\n=======================": [5, 4, 125763, 126032],
    "\t------------------": [5, 130008, 125653, 11, 11],
    "龘-------------------": [5, 130321, 130278, 130240, 125653, 125721],
    "hello ???????????????????????": [14833, 5, 128691, 128691, 128691, 128691, 126096],
    "\naaaaaaaaaaaaaaaaaaaaaaa": [5, 4, 6006, 44368, 63475],
    "哈哈哈哈哈哈哈哈哈哈哈": [5, 81908, 106086, 106086],
}


@pytest.mark.parametrize(("text", "ids"), RECORDED.items(), ids=range(len(RECORDED)))
def test_recorded_segmentations(released_tokenizers: Path, text: str, ids: list[int]) -> None:
    tokenizer = load_tokenizer_folder(released_tokenizers / "chatglm-6b", Family.CHATGLM)
    assert tokenizer.text_ids(text) == ids
    assert tokenizer.decode(ids) == text


def test_only_repetitions_change_places() -> None:
    folder = Path(__file__).parents[2] / "golden" / "tokenizers" / "chatglm"
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))
    ties = TieBreaker(model)
    for text in ("How many apples are left?", "这条裙子颜色很白", "。。。aaa  lll", ""):
        ids = model.EncodeAsIds(text)
        assert sorted(ties.settle(ids)) == sorted(ids)
        assert model.DecodeIds(ties.settle(ids)) == model.DecodeIds(ids)
