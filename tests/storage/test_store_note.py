"""A store says aloud when it falls back."""

from kvoffload_storage import FileStore, MemoryStore, StoreShape, TracingStore

SHAPE = StoreShape(n_layers=1, n_slices=1, slice_bytes=4096)


def test_buffered_files_are_noted(tmp_path):
    with_note = TracingStore(FileStore(tmp_path, SHAPE, direct="off"))
    assert "direct I/O was turned off" in with_note.note
    assert str(tmp_path) in with_note.note
    with_note.close()


def test_memory_has_nothing_to_say():
    assert MemoryStore(SHAPE).note == ""
