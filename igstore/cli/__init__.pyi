from igstore.cli.commands import COMMANDS as COMMANDS, SECTIONS as SECTIONS, module_of as module_of
from igstore.cli.options import (
    add_options as add_options,
    add_preprocessing as add_preprocessing,
    pop_preprocessing as pop_preprocessing,
)
from igstore.cli.output import Output as Output, say as say
from igstore.cli.parser import (
    BareParser as BareParser,
    Help as Help,
    Parser as Parser,
    choices_of as choices_of,
    positive as positive,
)
from igstore.cli.progress import Progress as Progress
from igstore.cli.running import (
    DONE as DONE,
    FAILED as FAILED,
    INTERRUPTED as INTERRUPTED,
    MISUSED as MISUSED,
    SOME_IMAGES_FAILED as SOME_IMAGES_FAILED,
    TERMINATED as TERMINATED,
    Terminated as Terminated,
    run as run,
)
from igstore.cli.text import (
    csv_text as csv_text,
    duration as duration,
    html as html,
    markdown as markdown,
    printable as printable,
    size as size,
)
