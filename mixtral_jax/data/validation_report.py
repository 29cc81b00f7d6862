"""The report of validate, for people."""

from collections.abc import Iterator

PRINTED_BAD_ROWS = 1000


def report_lines(report: dict) -> Iterator[str]:
    """Yields the lines of what validate returned, with the time of the run added to "run"."""
    bad = report["bad_rows"]
    for where, reason in bad["rows"][:PRINTED_BAD_ROWS]:
        yield f"{where}: {reason}"
    if bad["total"] > PRINTED_BAD_ROWS:
        yield f"... and {bad['total'] - PRINTED_BAD_ROWS:,} more"
    yield f"{bad['total']:,} rows cannot be read; data.max_bad_rows={bad['allowed']} may be skipped"
    yield ""
    width = max(len("source"), *map(len, report["sources"]))
    yield (
        f"{'source':<{width}}  {'split':<8}{'documents':>12}{'tokens':>17}{'bytes':>17}{'bytes/token':>13}"
        "  tokens in a document: 1%, half, 99%, longest"
    )
    for name, splits in report["sources"].items():
        for split, label in (("train", "train"), ("heldout", "held out")):
            yield f"{name:<{width}}  {label:<8}{_counts(splits[split])}"
    vocabulary = report["vocabulary"]
    yield ""
    yield f"duplicates   {report['duplicates']:,} documents have a text that came before"
    yield f"vocabulary   {vocabulary['used']:,} of {vocabulary['size']:,} ids occur ({_share(vocabulary['used'], vocabulary['size'])})"
    yield f"             {vocabulary['fallback_share']:.3%} of the tokens are unknown or single bytes"
    if report["run"] is not None:
        yield from _run(report["run"], width)


def _counts(counts: dict) -> str:
    ratio = counts["bytes_per_token"]
    lengths = ", ".join(f"{value:,}" for value in counts["document_tokens"].values())
    return (
        f"{counts['documents']:>12,}{counts['tokens']:>17,}{counts['bytes']:>17,}"
        f"{'-' if ratio is None else f'{ratio:.3f}':>13}  {lengths}"
    )


def _run(run: dict, width: int) -> Iterator[str]:
    yield ""
    yield (
        f"The run: {run['steps']:,} steps of {run['batch_size']} rows of {run['seq_len']} positions are "
        f"{run['positions']:,} tokens, {run['padding']:.2%} of them padding."
    )
    yield f"{'source':<{width}}  {'rows':>12}{'tokens':>17}{'epochs':>10}{'rows/epoch':>12}{'padding':>9}"
    for name, used in run["sources"].items():
        yield (
            f"{name:<{width}}  {used['rows']:>12,}{used['tokens']:>17,}{used['epochs']:>10.3f}"
            f"{used['rows_per_epoch']:>12,}{used['padding']:>9.2%}"
        )
    if run["seconds"] is None:
        yield f"time: {run['speed_from']}"
    else:
        yield f"time: {_time(run['seconds'])} at {run['tokens_per_second']:,.0f} tokens a second ({run['speed_from']})"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"


def _time(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d {hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"
