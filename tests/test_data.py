import pytest
import torch

from memformer_kernels.data import DataError, Lanes, RecallTask, Text
from memformer_kernels.data.recall import ASK, SYMBOLS


def test_the_standard_library_is_split_by_file_and_always_the_same():
    text = Text.read()
    assert text.files > 100
    assert 0.01 < len(text.validation) / (len(text.train) + len(text.validation)) < 0.15
    assert torch.equal(text.validation, Text.read().validation)


def test_a_file_keeps_its_side_of_the_split_when_others_are_added(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"<file {i}>" * 10)
    before = bytes(Text.read([tmp_path]).validation.tolist())
    (tmp_path / "another.txt").write_text("<another>")
    after = bytes(Text.read([tmp_path]).validation.tolist())
    assert b"<file" in before and set(before.split(b"\0")) <= set(after.split(b"\0"))


def test_binary_files_in_a_folder_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("some text, long enough to be split")
    (tmp_path / "b.bin").write_bytes(b"\x7fELF\0\0")
    text = Text.read([tmp_path])
    assert (text.files, text.skipped) == (1, 1)
    assert bytes(torch.cat([text.train, text.validation]).tolist()) == b"some text, long enough to be split"


def test_text_that_cannot_be_used_is_refused_by_name(tmp_path):
    binary = tmp_path / "b.bin"
    binary.write_bytes(b"\0\1")
    with pytest.raises(DataError, match=r"b\.bin: is a binary file"):
        Text.read([binary])
    with pytest.raises(DataError, match=r"no text found \(1 files, 1 of them binary\)"):
        Text.read([tmp_path])
    with pytest.raises(DataError, match="absent: no such file or folder"):
        Text.read([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no text found \(0 files"):
        Text.read([tmp_path / "empty"])


def test_lanes_read_on_contiguously_and_targets_are_one_byte_ahead():
    text = torch.arange(200, dtype=torch.uint8)
    lanes = Lanes(text, batch=2)
    first, second = lanes.rollout(2, 5), lanes.rollout(1, 5)
    for lane, start in ((0, 0), (1, 100)):
        tokens = torch.cat([segment[0][lane] for segment in first + second])
        targets = torch.cat([segment[1][lane] for segment in first + second])
        assert tokens.tolist() == list(range(start, start + 15))
        assert targets.tolist() == list(range(start + 1, start + 16))
    assert torch.equal(Lanes(text, 2, position=10).rollout(1, 5)[0][0], second[0][0])


def test_lanes_go_round_the_text():
    lanes = Lanes(torch.arange(10, dtype=torch.uint8), batch=1)
    lanes.rollout(1, 8)
    assert lanes.rollout(1, 8)[0][0].tolist() == [[8, 9, 0, 1, 2, 3, 4, 5]]
    with pytest.raises(DataError, match="holds 3 bytes; 8 lanes need more"):
        Lanes(torch.zeros(3, dtype=torch.uint8), batch=8)


def test_recall_shows_a_symbol_once_and_asks_for_it_at_the_end():
    segments = RecallTask(batch=64, length=8).rollout(4, torch.Generator().manual_seed(0))
    tokens = torch.stack([s[0] for s in segments])
    targets = torch.stack([s[1] for s in segments])
    shown = tokens < SYMBOLS
    assert shown.sum() == 64 and shown[0].any(-1).all()
    assert (tokens[-1, :, -1] == ASK).all() and (tokens == ASK).sum() == 64
    assert torch.equal(targets[-1, :, -1], tokens[0][shown[0]])
    assert (targets != -100).sum() == 64
