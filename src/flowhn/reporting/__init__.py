"""Records, and the tables, figures and verdicts that are made from records alone.

``record`` is standard library only and may be imported by anyone; the rest needs pandas and matplotlib. Import the
module you need (``from flowhn.reporting.tables import table1``): this file stays empty so that ``record`` stays light.
"""
