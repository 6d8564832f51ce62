from igstore.reporting import page as page, sections as sections
from igstore.reporting.charts import LOOKS as LOOKS, Chart as Chart, Panel as Panel, Series as Series
from igstore.reporting.figures import accuracy_by_p as accuracy_by_p
from igstore.reporting.pictures import heat_map as heat_map, picture_of as picture_of
