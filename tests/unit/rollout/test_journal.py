"""A journal of finished groups: torn, damaged, of before checksums, on a full disk."""

import resource

import pytest
import zstandard

from megatron_efr.durable import UnwritableError
from megatron_efr.rollout.group_json import encode_credited, encode_group
from megatron_efr.rollout.journal import Journal, JournalError
from megatron_efr.run.folder import RunFolder, RunFolderError
from tests.unit.run.test_folder import credited, group


def test_a_journal_torn_at_any_byte_gives_back_the_whole_groups_and_can_go_on(tmp_path):
    journal = Journal(tmp_path / "j" / "x.jsonl")
    assert journal.read() == ([], 0)
    for i in range(2):
        journal.append(group(i))
    journal.close()
    data = journal.path.read_bytes()
    first = data.index(b"\n") + 1
    for cut in (0, 1, first - 1, first, first + 1, len(data) - 1, len(data)):
        journal.path.write_bytes(data[:cut])
        groups, torn = journal.read()
        assert len(groups) == data[:cut].count(b"\n")
        assert torn == int(cut not in (0, first, len(data)))
        resumed = Journal(journal.path)
        resumed.append(group(9))
        resumed.close()
        after = resumed.read()
        assert [g.prompt.id for g in after.groups] == [f"p{i}" for i in range(len(groups))] + ["p9"]
        assert after.torn == 0
    journal.clear()
    assert not journal.path.exists()


def test_a_journal_damaged_in_the_middle_is_an_error(tmp_path):
    journal = Journal(tmp_path / "x.jsonl")
    journal.path.write_text('{"prompt": 1}\n' + encode_group(group()) + "\n")
    with pytest.raises(JournalError, match=r"x\.jsonl:1: not a finished group"):
        journal.read()


def test_scripts_of_another_version_are_named_with_their_file(tmp_path):
    folder, journal = RunFolder(tmp_path), Journal(tmp_path / "x.jsonl")
    folder.write_rollouts(1, [credited()])
    path = folder.rollouts_path(1)
    for made, before, known in (("budget", "budget", "no script"), ("most", '"most"', "most")):
        text = encode_group(group()).replace(before, before.replace(made, "later"))
        assert text != encode_group(group())
        journal.path.write_text(text + "\n")
        with pytest.raises(
            JournalError,
            match=rf"x\.jsonl:1: a group that this version does not know: script.*{known}",
        ):
            journal.read()
        rollouts = encode_credited(credited()).replace(before, before.replace(made, "later"))
        path.write_bytes(zstandard.compress(rollouts.encode()))
        with pytest.raises(
            RunFolderError, match=rf"zst: rollouts that this version does not know: script.*{known}"
        ):
            folder.read_rollouts(1)


def test_any_bit_of_a_journal_that_flips_is_noticed(tmp_path):
    journal = Journal(tmp_path / "x.jsonl")
    for number in (0, 1):
        journal.append(group(number))
    journal.close()
    whole = journal.path.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == 0x0A]
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        journal.path.write_bytes(data)
        if place == ends[-1]:
            assert (len(journal.read().groups), journal.read().torn) == (1, 1)
        else:
            with pytest.raises(JournalError, match=r"x\.jsonl:[12]: not a finished group"):
                journal.read()


def test_a_journal_from_before_checksums_is_read_and_goes_on_with_them(tmp_path):
    journal = Journal(tmp_path / "x.jsonl")
    journal.path.write_text(encode_group(group(0)) + "\n")
    journal.append(group(1))
    journal.close()
    assert [g.prompt.id for g in journal.read().groups] == ["p0", "p1"]


def test_a_journal_line_that_the_disk_takes_a_part_of_is_taken_back(tmp_path):
    journal = Journal(tmp_path / "x.jsonl")
    journal.append(group(0))
    size = journal.path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
    try:
        with pytest.raises(UnwritableError, match=r"x\.jsonl: cannot be written: .*--resume"):
            journal.append(group(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert journal.path.stat().st_size == size
    journal.append(group(2))
    journal.close()
    assert [g.prompt.id for g in journal.read().groups] == ["p0", "p2"]
