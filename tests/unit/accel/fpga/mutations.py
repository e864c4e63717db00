"""Are the RTL's tests any good? Lines of it are broken on purpose, one at a time; a test must notice each.

`python -m tests.unit.accel.fpga.mutations [NAME ...]`: some 20 s of a CPU each, most of it the core's build.
What changes nothing that anyone could see is not in the list: a shift by 63 bits or by 64, sums that are
shifted before anything is seen.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.crash.mutation_list import Mutation
from tests.crash.mutations import copy_tree, run_module

TESTS = [f"tests/unit/accel/fpga/test_{name}.py" for name in ("core", "streams", "channels")]
CARD_TESTS = ["tests/unit/accel/fpga/test_card.py"]


def _of(module: str, *mutations: tuple[str, str, str]) -> list[Mutation]:
    return [Mutation(name, f"accel/fpga/{module}.py", old, new) for name, old, new in mutations]


MUTATIONS = [
    *_of(
        "lanes",
        ("denormals are zeros", "is_zero = ~is_normal & ~fraction.any()", "is_zero = ~is_normal"),
        ("denormals' exponent", "Mux(is_normal, field, 1) - bias", "field - bias"),
        (
            "largest bfloat16 is infinite",
            "bits[7:15].all(), bits[10:15].all()",
            "bits[8:15].all(), bits[10:15].all()",
        ),
        (
            "largest float16 is infinite",
            "bits[7:15].all(), bits[10:15].all()",
            "bits[7:15].all(), bits[11:15].all()",
        ),
        (
            "infinite only if all are",
            "finite.eq(~Cat(is_infinite).any())",
            "finite.eq(~Cat(is_infinite).all())",
        ),
        ("bfloat16's fraction not shifted", "bits[:7] << 3", "bits[:7]"),
        ("far elements' shift wraps", "Mux(distance > 31, 31, distance)", "distance"),
        ("cut downwards", "Mux(negative, -magnitude, magnitude)", "Mux(negative, ~magnitude, magnitude)"),
        ("smallest exponent", "return Mux(a > b, a, b)", "return Mux(a < b, a, b)"),
    ),
    *_of(
        "score_unit",
        ("far one early", "is_far.eq(right < -LEFT_LIMIT)", "is_far.eq(right <= -LEFT_LIMIT)"),
        ("right shift wraps", "Mux(right > SHIFT_LIMIT, SHIFT_LIMIT, Mux(", "Mux(0, SHIFT_LIMIT, Mux("),
        ("only the last beat may be far", "Mux(is_first, 0, was_far) | far", "far"),
        ("far for ever", "Mux(is_first, 0, was_far) | far", "was_far | far"),
        (
            "largest score has no place",
            "score > SCORE_LIMIT, score < -SCORE_LIMIT",
            "score >= SCORE_LIMIT, score < -SCORE_LIMIT",
        ),
        (
            "smallest score has no place",
            "score > SCORE_LIMIT, score < -SCORE_LIMIT",
            "score > SCORE_LIMIT, score <= -SCORE_LIMIT",
        ),
        ("no place below is not said", "is_above | is_below | was_far", "is_above | was_far"),
        ("limit of small scores", "Mux(is_below, -SCORE_LIMIT, score)", "score"),
        ("first visible token", "position >= self.starts[row]", "position > self.starts[row]"),
        ("one token too many", "position < self.stops[row]", "position <= self.stops[row]"),
        ("token filter", "is_chosen & (position >=", "(position >="),
        ("whole scores rounded up", "((1 << SCORE_FRACTION) - 1)", "(1 << SCORE_FRACTION)"),
        ("unseen scores count as largest", "Mux(seen & (ceiling > so_far)", "Mux((ceiling > so_far)"),
        (
            "block's maximum from 0 on",
            "Mux(is_new_block, NO_MAX, self.above[row])",
            "Mux(is_new_block, 0, self.above[row])",
        ),
        ("unit's maximum for a block's", "is_new_block.eq(is_last_token)", "is_new_block.eq(0)"),
        (
            "unseen scores without a place",
            "is_complete[1] & sees & has_no_place",
            "is_complete[1] & has_no_place",
        ),
        ("places of half a token", "is_complete[1] & sees & has_no_place", "sees & has_no_place"),
    ),
    *_of(
        "value_unit",
        (
            "exponents of the unit before",
            "Mux(of_unit[3], EXPONENT_MIN, exponents[beat[3]])",
            "exponents[beat[3]]",
        ),
        (
            "exponents never grow",
            "m.d.comb += common.eq(larger(before, largest_now))",
            "m.d.comb += common.eq(largest_now)",
        ),
        ("maximum grows with each token", "Mux(of_block_at_7, down_at_7, 0)", "down_at_7"),
        ("totals' shift wraps", "Mux(shift > SHIFT_LIMIT, SHIFT_LIMIT, shift)", "shift"),
        ("weight summed with each beat", "valid[8] & is_first_beat", "valid[8]"),
        ("sums of the unit before", "Mux(of_unit[8], 0, self.sums[row] >> down)", "(self.sums[row] >> down)"),
        ("totals of the unit before", "Mux(of_unit[8], 0, now.data >> limited)", "now.data >> limited"),
        ("far weights wrap", "Mux(powers > FAR_BELOW, FAR_BELOW, powers)", "powers"),
        ("weights cut", "(mantissa + half) >> right", "mantissa >> right"),
        ("no interpolation", " + (rise >> TABLE_BITS))", ")"),
        ("products cut", "Cat(Const(1, 1), total)", "Cat(Const(0, 1), total)"),
        ("what does not count", "Mux(counts, Mux(", "Mux(1, Mux("),
    ),
    *_of(
        "core",
        ("a unit's next block", "can_begin & ~(ends & is_last_block)", "can_begin"),
        ("bank taken twice", "& ~is_taken.bit_select(new_bank, 1)", ""),
        ("bank is full for ever", "[is_taken[n].eq(0), is_full[n].eq(0)]", "[is_taken[n].eq(0)]"),
        (
            "block of the largest size",
            "block.tokens > shape.block_tokens",
            "block.tokens >= shape.block_tokens",
        ),
        ("block of nothing", "(block.tokens == 0) | ", ""),
        (
            "keys' end",
            "self.keys.payload.last != (last_beat & last_token)",
            "self.keys.payload.last & ~(last_beat & last_token)",
        ),
        (
            "values' end",
            "self.values.payload.last != (value_last_beat & value_last_token)",
            "~self.values.payload.last & value_last_beat & value_last_token",
        ),
        (
            "keys behind an error",
            "self.keys.ready.eq(key_active & ~has_failed)",
            "self.keys.ready.eq(key_active)",
        ),
        (
            "values behind an error",
            "self.values.ready.eq(value_active & ~has_failed)",
            "self.values.ready.eq(value_active)",
        ),
        ("blocks behind an error", "is_open\n                & ~has_failed\n", "is_open\n"),
        ("infinite keys", "score.not_finite | value.not_finite", "value.not_finite"),
        ("infinite values", "score.not_finite | value.not_finite", "score.not_finite"),
        ("channels' maxima", "with m.If(steps[0] & ~channels):", "with m.If(steps[0]):"),
        ("maximum that falls", "| (rises[r] < 0)", ""),
        ("far maximum wraps", "Mux(rises[r] > SHIFT_LIMIT, SHIFT_LIMIT, rises[r])", "rises[r]"),
        (
            "first token of a row",
            "with m.If(value_last_beat):\n                m.d.sync += is_first_of_unit.eq(0)",
            "with m.If(1):\n                m.d.sync += is_first_of_unit.eq(0)",
        ),
        ("maxima of the unit before", "m.d.sync += [maximum.eq(NO_MAX) for maximum in maxima]", "pass"),
        (
            "answer before all is summed",
            "Mux(all_blocks_out, Cat(1, drained), 0)",
            "Cat(all_blocks_out, drained)",
        ),
        ("units not counted", "self.units.eq(self.units + 1)", "self.units.eq(self.units)"),
        (
            "cycles at rest counted",
            "self.cycles.eq(self.cycles + self.busy)",
            "self.cycles.eq(self.cycles + 1)",
        ),
        ("largest head", "word[1] > shape.max_beats", "word[1] >= shape.max_beats"),
        ("no head", "(word[1] == 0) | ", ""),
        ("other dtypes", "is_bad = (word[0] > 1) | ", "is_bad = "),
        ("other kinds of units", " | (word[2] > 1)", ""),
        ("status of the unit before", "                        status.eq(0),\n", ""),
        (
            "rows that end early",
            "with m.If(payload.last):\n                        m.d.sync += status.eq(BAD_LENGTH)",
            "with m.If(0):\n                        m.d.sync += status.eq(BAD_LENGTH)",
        ),
        ("queries that end early", "payload.last != is_end", "~payload.last & is_end"),
        ("queries that do not end", "payload.last != is_end", "payload.last & ~is_end"),
        ("queries that end in half", "with m.If(~half & payload.last):", "with m.If(0):"),
        (
            "command behind an error",
            'with m.State("QUERIES"):\n                m.d.comb += self.command.ready.eq(~has_failed)',
            'with m.State("QUERIES"):\n                m.d.comb += self.command.ready.eq(1)',
        ),
    ),
    *_of(
        "kernel",
        (
            "reset by any write",
            "is_control & self.s_axi_wdata[0] & self.s_axi_wstrb[0]",
            "self.s_axi_wdata[0] & self.s_axi_wstrb[0]",
        ),
        (
            "reset by a 0",
            "is_control & self.s_axi_wdata[0] & self.s_axi_wstrb[0]",
            "is_control & self.s_axi_wstrb[0]",
        ),
        (
            "reset without its byte",
            "is_control & self.s_axi_wdata[0] & self.s_axi_wstrb[0]",
            "is_control & self.s_axi_wdata[0]",
        ),
        ("write before its response is taken", " & ~self.s_axi_bvalid", ""),
        (
            "read before its answer is taken",
            "self.s_axi_arready.eq(~self.s_axi_rvalid)",
            "self.s_axi_arready.eq(1)",
        ),
        ("answer of no register", "Mux(is_known, OKAY, SLAVE_ERROR)", "OKAY"),
        ("high word of the cycles", "core.cycles[32:]", "core.cycles[:32]"),
    ),
    *_of(
        "data_mover",
        (
            "bursts across a boundary",
            "Mux(left < room, left, room)",
            "Mux(left < page_beats, left, page_beats)",
        ),
        ("buffer without room", "(reserved + length <= self.buffer_beats) & ", ""),
        ("end of each burst", "response.last & ends.r_data", "response.last"),
        ("read error", "comes & (response.status != OKAY)", "0"),
        ("write error", "self.response.valid & (self.response.payload != OKAY)", "0"),
        ("answers under way forgotten", "~has_beat & (under_way == 0)", "~has_beat"),
    ),
    *_of(
        "card",
        ("job of no command", "(head[0] == 0) | (head[1] == 0)", "head[1] == 0"),
        ("job of no blocks", "(head[0] == 0) | (head[1] == 0)", "head[0] == 0"),
        ("core keeps what failed", "m.d.comb += [flush.eq(1), restart.eq(1)]", "m.d.comb += flush.eq(1)"),
        ("error while the answer is written", "m.d.sync += status.eq(status | BUS_ERROR)", "pass"),
        (
            "queues without room",
            "Mux(is_command, core.command.ready, have_room)",
            "Mux(is_command, core.command.ready, 1)",
        ),
        ("done stays", "m.d.sync += was_done.eq(0)", "pass"),
        ("half a register written", "with m.If(is_whole):", "with m.If(1):"),
        ("cycles of the run before", "[status.eq(0), cycles.eq(0), seen.eq(0)]", "[status.eq(0), seen.eq(0)]"),
    ),
]


def attempt(mutation: Mutation) -> str | None:
    """The test that noticed, None if none did."""
    with tempfile.TemporaryDirectory(prefix="kvfs-mutation-") as folder:
        tree = copy_tree(Path(folder))
        path = tree / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        of_card = Path(mutation.file).stem in ("card", "data_mover")
        tests = CARD_TESTS if of_card else TESTS
        environment = {"XDG_CACHE_HOME": str(tree / "cache")}
        return run_module(
            tree, ["pytest", "-qx", "-p", "no:cacheprovider", "-m", "not slow", *tests], environment
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutations to try, all by default")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    chosen = [each for each in MUTATIONS if not arguments.names or each.name in arguments.names]
    survivors = 0

    def timed(mutation: Mutation):
        began = time.monotonic()
        return mutation, attempt(mutation), time.monotonic() - began

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutation, noticed, seconds in pool.map(timed, chosen):
            survivors += noticed is None
            print(f"{seconds:4.0f} s  {mutation.name}: {noticed or 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} were noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
