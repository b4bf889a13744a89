"""Addresses, postal codes, cities and hospitals, in the order in which the detector asks for them."""

from __future__ import annotations

import shards.reports.identity.addresses as addresses
import shards.reports.identity.cities as cities
import shards.reports.identity.hospitals as hospitals
from shards.reports.identity.view import View


def find_addresses(view: View) -> None:
    """Claim street addresses; before dates, which many streets are named after."""
    addresses.find(view)


def find_addressed(view: View) -> None:
    """Claim codes with their cities, then hospitals."""
    cities.find_codes(view)
    hospitals.find(view)


def find_cities(view: View) -> None:
    """Claim the cities left, and the codes behind them."""
    cities.find_cities(view)
