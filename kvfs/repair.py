"""Mending what is safe to mend, from what a check found. Every change is one line.

Safe is: giving back what nothing names, counting references anew, moving what only parity gives back, and, of a
sequence with lost blocks, keeping its tokens up to the first page that is lost. A file keeps its lost blocks:
reading them fails, writing them anew mends them. Never: guessing bytes.
"""

import time
from dataclasses import replace

from kvfs.check import Report, check_extents
from kvfs.inspection import Inspection
from kvfs.metadata import SequenceRow


def repair(inspection: Inspection, report: Report) -> list[str]:
    """What was done, a line each. The drive is open for writing. Raises NvmeStatusError, CatalogueFull."""
    done: list[str] = []
    if inspection.owners is not None:
        done += _mend_catalogue(inspection, report)
        done += _give_back(inspection, report)
    if inspection.flash.health()["damaged_superblocks"]:
        done.append(f"wrote {inspection.flash.renew()} superblocks anew, of which parity gave pages back")
    inspection.namespace.flush()
    return done


def _mend_catalogue(inspection: Inspection, report: Report) -> list[str]:
    catalogue, owners, done = inspection.catalogue, inspection.owners, []
    with catalogue.transaction():
        for sequence_id, num_tokens in sorted(report.whole_tokens.items()):
            row = owners.sequences[sequence_id]
            num_tokens = _cut(inspection, row, num_tokens)
            done.append(f"truncated sequence {row.name!r} from {row.num_tokens} to {num_tokens} tokens")
        num_broken, num_counts, freed = catalogue.mend_references()
        num_objects = catalogue.objects.mend(report.lost_objects)
        num_segments = catalogue.derived.mend(report.lost_segments)
        done += owners.files.remove_extents(report.not_theirs)
        done += owners.files.mend()
    if num_broken:
        done.append(f"removed {num_broken} rows of the catalogue that led nowhere")
    if num_counts:
        done.append(f"counted the references of {num_counts} groups anew")
    if num_objects:
        done.append(f"dropped {num_objects} objects whose bytes are not all there")
    if num_segments:
        done.append(f"dropped {num_segments} derived segments that are not whole: they can be made again")
    if freed:
        blocks = sum(num_lbas for _, num_lbas in freed)
        done.append(f"gave back {len(freed)} groups of {blocks} blocks that no sequence has")
    if done:
        catalogue.sync()  # before blocks that it named are given back
        inspection.look_again()
    return done


def _cut(inspection: Inspection, row: SequenceRow, num_tokens: int) -> int:
    """Keep the first tokens, which are whole pages of the groups; how many."""
    catalogue, group_tokens = inspection.catalogue, inspection.owners.layout(row).geometry.group_tokens
    num_groups = -(-num_tokens // group_tokens)
    groups = catalogue.groups(row.id)[:num_groups]
    if num_tokens % group_tokens and sum(link[2] == groups[-1].id for link in catalogue.links()) > 1:
        # a group is appended to by one sequence only: of forks that are cut inside it, the last one keeps it
        num_groups -= 1
        num_tokens = num_groups * group_tokens
        groups = groups[:num_groups]
    tokens = catalogue.tokens(row.id)[:num_tokens]
    if num_tokens % group_tokens:  # what is appended next changes the last group
        catalogue.derived.drop_ending_in(groups[-1].id)
    cut = replace(
        row,
        changed_ns=time.time_ns(),
        num_tokens=num_tokens,
        num_spilled=num_tokens,
        tail_lba=0,
        tail_lbas=0,
    )
    catalogue.store_sequence(cut, groups, num_groups, tokens, num_tokens)
    return num_tokens


def _give_back(inspection: Inspection, report: Report) -> list[str]:
    """Deallocate what nothing names now, and lost blocks that are named but hold no token."""
    if inspection.owners.bad_models:
        return []  # what a damaged row does not name may be somebody's all the same
    done, now = [], Report()
    check_extents(inspection.namespace, inspection.owners, inspection.volume.first_data_lba, (), now)
    if now.leaked:
        inspection.namespace.deallocate(now.leaked)
        done.append(f"gave back {sum(count for _, count in now.leaked)} blocks that nothing names")
    leaked = {lba for first, count in now.leaked for lba in range(first, first + count)}
    unused = [
        (lba, 1)
        for lba in report.lost
        if lba not in leaked and inspection.owner(lba).area in ("nothing", "slack")
    ]
    if unused:
        inspection.namespace.deallocate(unused)
        done.append(f"gave back {len(unused)} lost blocks that hold no token")
    return done
