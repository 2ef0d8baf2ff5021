"""The machine that numbers were measured on."""

from __future__ import annotations

from moyu.measure.environment import last_level_cache, read_buffer


def machine(root, caches):
    """What the system tells of caches: {cpu: [(level, size, cores that share it)]}."""
    for cpu, held in caches.items():
        for index, (level, size, shared) in enumerate(held):
            folder = root / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{value}\n")
    return root


def test_the_read_ceiling_is_taken_over_more_than_the_last_level_caches_hold(tmp_path):
    two = {cpu: [(1, "32K", cpu), (2, "1024K", cpu), (3, "393216K", "0-1" if cpu < 2 else "2-3")] for cpu in range(4)}
    assert last_level_cache(machine(tmp_path / "server", two)) == 768 << 20  # two of 384 MiB
    assert read_buffer(768 << 20) == 3 << 30
    small = {0: [(1, "32K", 0), (2, "4M", "0")]}
    assert last_level_cache(machine(tmp_path / "small", small)) == 4 << 20
    assert read_buffer(4 << 20) == 256 << 20
    assert last_level_cache(tmp_path / "nothing") == 0


def test_a_benchmark_asks_for_that(monkeypatch):
    from moyu import kernels
    from moyu.measure import benchmark
    from tiny import build, tokens

    asked = []
    ceiling = kernels.ReadCeiling
    monkeypatch.setattr(benchmark, "last_level_cache", lambda: 300 << 20)
    monkeypatch.setattr(kernels, "ReadCeiling", lambda size: (asked.append(size), ceiling(1 << 20))[1])
    benchmark.compare(build("llama").float(), {}, prompt=tokens(1, 4), tokens=2, rounds=1)
    assert asked == [1200 << 20]
