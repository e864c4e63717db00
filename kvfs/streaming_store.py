"""Stores past the caches, for what the CPU fills and only the drive reads.

An ordinary store first reads the line that it is about to overwrite; writing it whole, past the caches, saves
that read and leaves the caches to others.
"""

from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic

PIECE_BYTES = 16
_PIECE = ir.VectorType(ir.IntType(64), 2)


@intrinsic
def copy_piece(typingctx, target, source):
    """Copy 16 bytes between int64 addresses; the target is a multiple of 16, the source of 8."""

    def codegen(context, builder, signature, arguments):
        target_, source_ = (builder.inttoptr(address, _PIECE.as_pointer()) for address in arguments)
        loaded = builder.load(source_, align=8)
        store = builder.store(loaded, target_, align=PIECE_BYTES)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def finish_pieces(typingctx):
    """Make all pieces copied so far visible to other threads before whatever follows."""

    def codegen(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen
