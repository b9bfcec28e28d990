"""What a network sees of an image: crops and their geometry, matching, color, masks.

All are pure functions; what is random is drawn from a generator that is passed in. `crops` draws and cuts views,
`geometry` says which source pixels their patches cover, `matching` which patches of two views show the same place,
`plaincolor` how views and their patches are colored, as `color` and `patchcolor` do fast, `masks` what a student is not
shown; `config` has the settings of all.
"""
