from igstore.evaluation.findings import KEEPS as KEEPS, Case as Case, Contrast as Contrast, Findings as Findings
from igstore.evaluation.inference import (
    ShowingPlan as ShowingPlan,
    show as show,
    target_probabilities as target_probabilities,
)
from igstore.evaluation.results import (
    PAIRING_FIELDS as PAIRING_FIELDS,
    Row as Row,
    measure as measure,
    predictions as predictions,
    settings_sha256 as settings_sha256,
)
from igstore.evaluation.results_folder import (
    RESULTS as RESULTS,
    check_out as check_out,
    read_rows as read_rows,
    results_json as results_json,
    write_report as write_report,
)
from igstore.evaluation.tables import (
    Line as Line,
    Table as Table,
    article_tables as article_tables,
    images_of as images_of,
    kinds as kinds,
    overview as overview,
    percent as percent,
)
