"""`kvfsctl tree`: models and their sequences, with sizes."""

from kvfsctl.opening import open_store
from kvfsctl.output import JsonOption, StoreArgument, print_json
from kvfsctl.paging import AfterOption, LimitOption, pages, say_more


def tree(
    drive: StoreArgument, limit: LimitOption = None, after: AfterOption = "", json_output: JsonOption = False
):
    """Show models with their shapes, and below them sequences with tokens, size and attributes."""
    from kvfs.sizes import format_size

    with open_store(drive) as store:
        rows = [row for page in pages(store, after, limit) for row in page]
        models = [_described(model, store, rows) for model in store.models()]
    if json_output:
        print_json("tree", drive=str(drive), models=models)
        return

    from rich.console import Console
    from rich.markup import escape
    from rich.tree import Tree

    root = Tree(escape(str(drive)))
    for model in models:
        shape = f"{model['num_layers']} layers, {model['num_kv_heads']} KV heads of {model['head_dim']}"
        size = format_size(sum(sequence["size_bytes"] for sequence in model["sequences"]))
        branch = root.add(f"[bold]{escape(model['name'])}[/bold]  {shape}, {model['dtype']}  {size}")
        for sequence in model["sequences"]:
            notes = "".join(
                f"  {name}={value}"
                for name, value in sequence["attributes"].items()
                if name.startswith("user.")
            )
            size = format_size(sequence["size_bytes"])
            branch.add(escape(f"{sequence['name']}  {sequence['num_tokens']:,} tokens  {size}{notes}"))
    Console(soft_wrap=True).print(root)
    if rows:
        say_more(len(rows), limit, rows[-1].name)


def _described(model, store, rows) -> dict:
    sequences = [store.sequence(row.name) for row in rows if row.model_id == model.id]
    return {
        "name": model.name,
        **vars(model.geometry),
        "sequences": [
            {
                "name": sequence.name,
                "num_tokens": sequence.num_tokens,
                "size_bytes": sequence.num_tokens * model.geometry.token_bytes,
                "attributes": {
                    name: value.decode("utf-8", "backslashreplace")
                    for name, value in sequence.attributes().items()
                },
            }
            for sequence in sequences
        ],
    }
