"""The reports of validate, validate_chat and write_corrected, for people."""

from collections.abc import Callable, Iterator

from mixtral_jax.data.mend import RULES

PRINTED_BAD_ROWS = 1000
SPLITS = {"train": "train", "heldout": "held out"}


def report_lines(report: dict) -> Iterator[str]:
    """Yields the lines of what validate or validate_chat returned, with the time of the run added to "run"."""
    bad, chat = report["bad_rows"], "stage" in report
    yield from _first(bad["rows"], bad["total"], lambda row: f"{row[0]}: {row[1]}")
    yield f"{bad['total']:,} rows cannot be read; data.max_bad_rows={bad['allowed']} may be skipped"
    width = max(len("source"), *map(len, report["sources"]))
    yield from _chat(report, width) if chat else _text(report, width)
    vocabulary, what = report["vocabulary"], "rows say" if chat else "documents have a text"
    yield ""
    yield f"duplicates   {report['duplicates']:,} {what} {'what another said before' if chat else 'that came before'}"
    if chat:
        prompts = report["prompts"]
        yield (
            f"prompts      {prompts['train']:,} in training, {prompts['heldout']:,} held out, {prompts['both']:,} on both sides "
            f"({prompts['nearly_both']:,} if case and white space do not count)"
        )
    yield f"vocabulary   {vocabulary['used']:,} of {vocabulary['size']:,} ids occur ({_share(vocabulary['used'], vocabulary['size'])})"
    yield f"             {vocabulary['fallback_share']:.3%} of the tokens are unknown or single bytes"
    if report["run"] is not None:
        yield from _run(report["run"], width)


def corrected_lines(report: dict) -> Iterator[str]:
    """Yields the lines of what write_corrected returned."""
    mended = len(report["rows_mended"])
    yield from _first(report["rows_mended"], mended, lambda row: f"{row[0]}: mended ({', '.join(row[1])})")
    yield from _first(report["rows_left_out"], report["left_out"], lambda row: f"{row[0]}: left out, {row[1]}")
    yield f"{report['file']}: {report['kept']:,} of {report['rows']:,} rows, {report['left_out']:,} left out"
    for rule, count in report["rules"].items():
        yield f"  {rule:<18}{count:>9,} rows: {RULES[rule]}"


def _first(rows: list, total: int, line: Callable[[list], str]) -> Iterator[str]:
    yield from map(line, rows[:PRINTED_BAD_ROWS])
    if total > PRINTED_BAD_ROWS:
        yield f"... and {total - PRINTED_BAD_ROWS:,} more"


def _text(report: dict, width: int) -> Iterator[str]:
    yield ""
    yield (
        f"{'source':<{width}}  {'split':<8}{'documents':>12}{'tokens':>17}{'bytes':>17}{'bytes/token':>13}"
        "  tokens in a document: 1%, half, 99%, longest"
    )
    for name, splits in report["sources"].items():
        for split, label in SPLITS.items():
            yield f"{name:<{width}}  {label:<8}{_counts(splits[split])}"


def _chat(report: dict, width: int) -> Iterator[str]:
    """The rows that are left out by rule, and the table of each source's rows and of its splits."""
    dropped, unit = report["dropped"], "conversations" if report["stage"] == "sft" else "pairs"
    rows = dropped["rows"]
    yield from _first(
        rows, dropped["total"], lambda row: f"{row[0]}: {row[1]}{f', {row[2]:,} positions' if row[2] else ''}"
    )
    yield f"{dropped['total']:,} rows are left out by rule"
    yield ""
    rules = ("rows", unit, "bad", "too_long", "empty", "no_trained_token", "identical", "longest")
    yield f"{'source':<{width}}  " + "".join(f"{rule:>{len(rule) + 3}}" for rule in rules) + " positions"
    for name, counts in report["sources"].items():
        yield f"{name:<{width}}  " + "".join(f"{counts[rule]:>{len(rule) + 3},}" for rule in rules)
    yield ""
    answers = ("answer",) if report["stage"] == "sft" else ("chosen", "rejected")
    lengths = ", ".join(("document", *answers))
    yield (
        f"{'source':<{width}}  {'split':<8}{unit:>14}{'turns':>11}{'tokens':>14}{'trained':>14}{'share':>9}"
        f"  tokens of {lengths}: 1%, half, 99%, longest"
    )
    for name, counts in report["sources"].items():
        for split, label in SPLITS.items():
            found = counts[split]
            share = "-" if found["trained_share"] is None else f"{found['trained_share']:.1%}"
            shown = "; ".join(_lengths(found[f"{what}_tokens"]) for what in ("document", *answers))
            yield (
                f"{name:<{width}}  {label:<8}{found[unit]:>14,}{found['turns']:>11,}{found['tokens']:>14,}"
                f"{found['trained_tokens']:>14,}{share:>9}  {shown}"
            )


def _lengths(found: dict) -> str:
    return ", ".join(f"{value:,}" for value in found.values())


def _counts(counts: dict) -> str:
    ratio = counts["bytes_per_token"]
    lengths = _lengths(counts["document_tokens"])
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
    if "trained_tokens" in run:
        yield f"{run['trained_tokens']:,} of them are trained on ({run['trained_share']:.1%})."
    yield f"{'source':<{width}}  {'rows':>12}{'tokens':>17}{'epochs':>10}{'rows/epoch':>12}{'steps/epoch':>13}{'padding':>9}"
    for name, used in run["sources"].items():
        yield (
            f"{name:<{width}}  {used['rows']:>12,}{used['tokens']:>17,}{used['epochs']:>10.3f}"
            f"{used['rows_per_epoch']:>12,}{_steps(used['steps_per_epoch']):>13}{used['padding']:>9.2%}"
        )
    if run["seconds"] is None:
        yield f"time: {run['speed_from']}"
    else:
        yield f"time: {_time(run['seconds'])} at {run['tokens_per_second']:,.0f} tokens a second ({run['speed_from']})"


def _steps(count: float | None) -> str:
    return "-" if count is None else f"{count:,.1f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"


def _time(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d {hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"
