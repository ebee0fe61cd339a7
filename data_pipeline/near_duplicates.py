"""Pictures that look the same, by their 64-bit perceptual hashes, out of core.

Two hashes within Hamming distance k, cut into k + 3 blocks of bits, agree in at least three of the blocks.
So for each choice of three blocks, hashes are joined by those blocks' bits, and only pairs that agree there
are compared (the block permutations of Manku, Jain and Das Sarma, WWW 2007). At k = 3 that is 20 joins by
about 32 bits: among a billion random hashes a hash meets 0.2 others per join. Plain banding (k + 1 = 4
blocks, one has to agree) would join by 16 bits, where each hash meets 15 thousand others.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import duckdb

AGREEING_BLOCKS = 3
BITS = 64
CROWD = 64  # hashes that agree under a mask: from here on, more joins cost less than comparing each with each


def find_near_duplicates(
    connection: duckdb.DuckDBPyConnection, pictures: str, distance: int, into: str
) -> int:
    """Find pictures that have a better one within `distance`.

    Of two pictures that look the same the one with the lower rank is better. A picture goes when any better
    one is near, whether that one stays or not, so a chain of look-alikes leaves its best.

    Args:
        connection: where to work.
        pictures: a table or query with `rank` (UBIGINT, distinct) and `phash` (UBIGINT).
        distance: greatest Hamming distance that counts as the same.
        into: name of the temporary table to make, with the column `rank`.

    Returns:
        The number of pictures that go.
    """
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE distinct_hashes AS "
        f"SELECT phash, min(rank) AS rank FROM ({pictures}) GROUP BY phash"
    )
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE {into} AS SELECT rank FROM ({pictures}) "
        "WHERE rank NOT IN (SELECT rank FROM distinct_hashes)"
    )
    every_bit = (1 << BITS) - 1
    for mask in block_masks(distance, every_bit) if distance else ():
        under = f"phash & {mask}::UBIGINT"
        crowds = f"SELECT {under} AS under FROM distinct_hashes GROUP BY under HAVING count(*) > {CROWD}"
        connection.execute(
            "CREATE OR REPLACE TEMP TABLE crowd AS "
            f"SELECT rank, phash FROM distinct_hashes WHERE ({under}) IN ({crowds})"
        )
        if not connection.execute("SELECT 1 FROM crowd LIMIT 1").fetchall():
            _find_pairs(connection, "distinct_hashes", mask, distance, into)
            continue
        others = "(SELECT * FROM distinct_hashes WHERE rank NOT IN (SELECT rank FROM crowd))"
        _find_pairs(connection, others, mask, distance, into)
        for finer in block_masks(distance, every_bit ^ mask):
            _find_pairs(connection, "crowd", mask | finer, distance, into)
    connection.execute("DROP TABLE distinct_hashes")
    connection.execute("DROP TABLE IF EXISTS crowd")
    return int((connection.execute(f"SELECT count(*) FROM {into}").fetchone() or (0,))[0])


def _find_pairs(
    connection: duckdb.DuckDBPyConnection, table: str, mask: int, distance: int, into: str
) -> None:
    """Add those of a table's hashes that have a better one near, which agrees with them under a mask.

    A loser already found needs no second mention, but must stay in: it can still show up another's loss.
    """
    hashes = f"SELECT rank, phash, phash & {mask}::UBIGINT AS under FROM {table}"
    connection.execute(
        f"INSERT INTO {into} SELECT DISTINCT worse.rank FROM ({hashes}) AS better "
        f"JOIN ({hashes}) AS worse ON better.under = worse.under AND better.rank < worse.rank "
        f"WHERE bit_count(xor(better.phash, worse.phash)) <= {distance} "
        f"AND worse.rank NOT IN (SELECT rank FROM {into})"
    )


def block_masks(distance: int, bits: int) -> list[int]:
    """Masks such that any two hashes within `distance` agree under at least one of them.

    Args:
        distance: at least 1.
        bits: the bits to choose from, as a mask.
    """
    places = [place for place in range(BITS) if bits >> place & 1]
    blocks = distance + AGREEING_BLOCKS
    edges = [len(places) * i // blocks for i in range(blocks + 1)]
    block = [sum(1 << place for place in places[low:high]) for low, high in pairwise(edges)]
    return [sum(chosen) for chosen in combinations(block, AGREEING_BLOCKS)]
